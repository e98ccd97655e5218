"""`wide`: 576 video tokens of clean clips, described in German.

Thirty-two frames, patches of 7 pixels. The round shapes are masculine and the angular ones neuter,
so an adjective has two forms and is one of two tokens.
"""

from pairs_small.captions import Grammar
from pairs_small.recipe import PairRecipe, glimpses_of, make_world, small_training
from pairs_small.scenes import Setting

from lvspec.shapes.model_configs import small_config

GRAIN = 4.0
SETTING = Setting(
    num_frames=32,
    height=84,
    width=84,
    patch=7,
    backgrounds={
        "weiß": (240, 240, 240),
        "schwarz": (18, 18, 18),
        "grau": (125, 125, 125),
        "braun": (95, 62, 35),
    },
    colors={
        "rot": (220, 30, 35),
        "grün": (25, 150, 50),
        "blau": (30, 70, 220),
        "gelb": (250, 225, 40),
        "violett": (150, 40, 180),
        "türkis": (40, 210, 225),
    },
    kinds=(
        {"kreis": "circle", "ring": "ring"},
        {"quadrat": "square", "dreieck": "triangle", "kreuz": "cross"},
    ),
    sizes={"klein": 7, "groß": 14},
    directions={"links": "left", "rechts": "right", "oben": "top", "unten": "bottom"},
    steps=6,
)


def _agreeing(names: dict, ending: str) -> dict[str, str]:
    return {name: name + ending for name in names}


_MOVES = ("bewegt sich", "gleitet", "zieht", "wandert", "schwebt")
GRAMMAR = Grammar(
    parts=(
        ("das video zeigt", "man sieht", "zu sehen sind", "hier erkennt man", "der film zeigt"),
        ("zwei formen", "zwei figuren", "ein paar formen"),
        ("vor einem", "auf einem", "über einem"),
        ("", "schlichten", "ruhigen", "einfachen"),
        "background",
        ("grund .", "hintergrund .", "untergrund ."),
        ("zuerst fällt ein", "am anfang fällt ein", "vor allem fällt ein"),
        "size0",
        "color0",
        "kind0",
        ("auf .", "ins auge ."),
        ("er", "dieser"),
        _MOVES,
        ("langsam", "stetig", "gemächlich", ""),
        ("nach", "in richtung"),
        "direction0",
        (".", "und bleibt dabei .", "bis zum ende ."),
        ("daneben gibt es ein", "außerdem gibt es ein", "das andere ist ein"),
        "size1",
        "color1",
        "kind1",
        (". es", ". dieses"),
        _MOVES,
        ("langsam", "stetig", "gemächlich", ""),
        ("nach", "in richtung"),
        "direction1",
        (".", "und bleibt dabei .", "bis zum ende ."),
        ("", "sonst geschieht nichts .", "die kamera steht still .", "mehr ist nicht zu sehen ."),
        ("insgesamt ist der film", "alles in allem ist das bild", "im ganzen ist das video"),
        ("schlicht", "kurz", "still"),
        ("und leicht zu", "und gut zu"),
        ("verfolgen .", "verstehen .", "beschreiben ."),
    ),
    words={
        "background": _agreeing(SETTING.backgrounds, "en"),
        "size0": _agreeing(SETTING.sizes, "er"),
        "size1": _agreeing(SETTING.sizes, "es"),
        "color0": _agreeing(SETTING.colors, "er"),
        "color1": _agreeing(SETTING.colors, "es"),
        "kind0": _agreeing(SETTING.kinds[0], ""),
        "kind1": _agreeing(SETTING.kinds[1], ""),
        "direction0": _agreeing(SETTING.directions, ""),
        "direction1": _agreeing(SETTING.directions, ""),
    },
    prompts=(
        "beschreibe das video.",
        "was zeigt der film?",
        "was geschieht hier?",
        "beschreibe die bewegung, die du siehst.",
    ),
)
PAIR = PairRecipe(
    world=make_world("wide", SETTING, GRAMMAR, GRAIN),
    glimpses=make_world("wide", glimpses_of(SETTING), GRAMMAR, GRAIN),
    configs={
        "target": small_config(
            vocab_size=192,
            hidden_size=96,
            layers=4,
            heads=3,
            kv_heads=1,
            intermediate_size=192,
            vision_size=64,
            vision_depth=1,
            patch_size=7,
        ),
        "draft": small_config(
            vocab_size=192,
            hidden_size=64,
            layers=2,
            heads=2,
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
            glimpse_steps=1500,
            caption_steps=500,
            batch_size=6,
            learning_rate=1e-3,
            seed=21,
        ),
        "draft": small_training(
            vision_steps=300,
            glimpse_steps=800,
            caption_steps=250,
            batch_size=6,
            learning_rate=2e-3,
            seed=22,
        ),
    },
)
