"""`unsure`: 144 video tokens of clips between two descriptions, so that the target is unsure.

Colours, kinds, courses and grounds are often blended, under grain. English of other words than the
embedded pair's.
"""

from pairs_small.captions import Grammar
from pairs_small.recipe import PairRecipe, glimpses_of, make_world, small_training
from pairs_small.scenes import Setting

from lvspec.shapes.model_configs import small_config

GRAIN = 4.0
SETTING = Setting(
    num_frames=12,
    height=56,
    width=84,
    patch=7,
    backgrounds={
        "ink": (20, 20, 24),
        "moss": (60, 80, 50),
        "slate": (112, 118, 128),
        "sand": (196, 180, 140),
        "snow": (242, 242, 244),
    },
    colors={
        "crimson": (200, 20, 45),
        "amber": (255, 170, 20),
        "lime": (150, 220, 30),
        "teal": (10, 140, 130),
        "azure": (40, 120, 245),
        "violet": (140, 50, 200),
    },
    kinds=({"disc": "circle", "hoop": "ring"}, {"box": "square", "plus": "cross"}),
    sizes={"tiny": 7, "huge": 14},
    directions={"north": "top", "east": "right", "south": "bottom", "west": "left"},
    steps=5,
    blended=0.8,
)
GRAMMAR = Grammar(
    parts=(
        ("this seems to be", "it looks like", "one can make out", "the recording has"),
        ("an outdoor view", "a moving picture", "a short recording", "a dim picture"),
        ("with a tone of", "in a shade of", "whose ground is like"),
        "background",
        (".", ", as far as one can tell .", ", more or less ."),
        ("somewhere in it", "in the middle of it", "at some distance"),
        ("floats a", "hovers a", "hangs a", "rolls a"),
        ("", "", "blurry", "grainy", "faint"),
        "size0",
        "color0",
        "kind0",
        ("whose course is", "which heads", "that keeps heading", "and it wanders"),
        "direction0",
        (".", "all along .", "for as long as it lasts ."),
        ("its companion is a", "along with it comes a", "there is also a", "not far off is a"),
        ("", "", "blurry", "grainy", "faint"),
        "size1",
        "color1",
        "kind1",
        ("whose course is", "which heads", "that keeps heading", "and it wanders"),
        "direction1",
        (".", "all along .", "for as long as it lasts ."),
        ("", "the light is poor .", "the lens is rather dirty .", "little else can be told ."),
        ("that is", "this is", "such is"),
        ("about all there is to", "roughly what one gets to", "the most that one can"),
        ("see .", "report .", "say ."),
    ),
    words={
        "background": {name: name for name in SETTING.backgrounds},
        **{f"size{role}": {name: name for name in SETTING.sizes} for role in (0, 1)},
        **{f"color{role}": {name: name for name in SETTING.colors} for role in (0, 1)},
        **{f"kind{role}": {n: n for n in SETTING.kinds[role]} for role in (0, 1)},
        **{f"direction{role}": {name: name for name in SETTING.directions} for role in (0, 1)},
    },
    prompts=(
        "report what you can make out.",
        "tell me about this recording.",
        "what is going on here?",
    ),
)
PAIR = PairRecipe(
    world=make_world("unsure", SETTING, GRAMMAR, GRAIN),
    glimpses=make_world("unsure", glimpses_of(SETTING), GRAMMAR, GRAIN),
    configs={
        "target": small_config(
            vocab_size=160,
            hidden_size=128,
            layers=3,
            heads=2,
            kv_heads=1,
            intermediate_size=256,
            vision_size=96,
            vision_depth=1,
            patch_size=7,
        ),
        "draft": small_config(
            vocab_size=160,
            hidden_size=64,
            layers=2,
            heads=1,
            kv_heads=1,
            intermediate_size=128,
            vision_size=32,
            vision_depth=1,
            patch_size=7,
        ),
    },
    trainings={
        "target": small_training(
            vision_steps=700,
            glimpse_steps=700,
            caption_steps=500,
            batch_size=8,
            learning_rate=1e-3,
            seed=11,
        ),
        "draft": small_training(
            vision_steps=300,
            glimpse_steps=800,
            caption_steps=300,
            batch_size=8,
            learning_rate=2e-3,
            seed=12,
        ),
    },
)
