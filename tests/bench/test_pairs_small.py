"""bench/pairs_small: what the small pairs are trained on, and a whole training of a few steps."""

import importlib
import itertools
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))  # where its scripts look

from pairs.choice import choose
from pairs_small import clips, pair, scenes, train, unsure, wide
from pairs_small.recipes import RECIPES

from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import Output, lvspec_method
from lvspec.policy import AcceptancePolicy
from lvspec.shapes import calibration, data, evaluation
from lvspec.shapes.tasks import TASKS
from lvspec.shapes.tokenizer import build_tokenizer
from lvspec.video.config import VideoProcessorConfig
from lvspec.video.patches import preprocess_video

SETTINGS = {"unsure": unsure.SETTING, "wide": wide.SETTING}
GRAMMARS = {"unsure": unsure.GRAMMAR, "wide": wide.GRAMMAR}


@pytest.fixture(params=sorted(RECIPES))
def name(request):
    return request.param


def test_scales_differ_from_the_embedded_pair_and_each_other():
    worlds = {name: recipe.world for name, recipe in RECIPES.items()}
    assert (worlds["wide"].video_tokens, worlds["unsure"].video_tokens) == (576, 144)
    words = [set(world.vocabulary()) for world in (*worlds.values(), data.EMBEDDED)]
    prompts = [set(world.prompts) for world in (*worlds.values(), data.EMBEDDED)]
    for first in range(3):
        for second in range(first):
            assert len(words[first] & words[second]) < len(words[first]) / 2
            assert not prompts[first] & prompts[second]
    texts = [recipe.configs["target"].text_config for recipe in RECIPES.values()]
    widths = {text.hidden_size for text in texts} | {256}
    assert len(widths) == 3, "the embedded target is 256 wide"
    for recipe in RECIPES.values():
        target, draft = (recipe.configs[role].text_config for role in ("target", "draft"))
        assert draft.num_hidden_layers < target.num_hidden_layers
        assert len(recipe.world.vocabulary()) <= target.vocab_size == draft.vocab_size


def test_training_draws_no_held_out_description(name):
    """Neither is shown nor said: what a training run really sees and reads."""
    world = RECIPES[name].world
    held_out = {
        scene.description
        for split in ("evaluation", "calibration")
        for scene in world.scenes(split, 60, 7)
    }
    maker = data.BatchMaker(build_tokenizer(world.vocabulary()), 1, 1.0, world)
    drawn = [scene for _ in range(6) for scene in maker.batch(10).scenes]
    seen = {scene.description for scene in drawn}
    read = {scenes.describe(scene.said) for scene in drawn}
    assert len(held_out) == 120 and len(seen) > 57
    assert not (seen | read) & held_out
    assert (seen == read) == (name == "wide"), "captions of blended scenes say either"


def test_held_out_splits_share_nothing_and_say_the_truth(name):
    first, second = (RECIPES[name].world.scenes(s, 60, 0) for s in ("evaluation", "calibration"))
    assert not {s.description for s in first} & {s.description for s in second}
    assert all(list(scene.said) == scene.attributes() for scene in first + second)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split: expected one of .* got 'test'"):
        scenes.random_scene(random.Random(0), wide.SETTING, "test")


@pytest.mark.slow
def test_more_scenes_than_a_setting_has_is_an_error():
    """Both looped for ever: too many of a split, and a frame in which no two shapes are apart."""
    grounds = dict(list(wide.SETTING.backgrounds.items())[:2])
    colors = dict(list(wide.SETTING.colors.items())[:2])
    kinds = tuple(dict(list(kinds.items())[:2]) for kinds in wide.SETTING.kinds)
    few = replace(
        wide.SETTING, backgrounds=grounds, colors=colors, kinds=kinds, sizes={"klein": 7}
    )
    have = sum(
        scenes.split_of(" ".join((ground, "klein", *first, "klein", *second))) == "evaluation"
        for ground in grounds
        for first in itertools.product(colors, kinds[0], few.directions)
        for second in itertools.product(colors, kinds[1], few.directions)
    )
    assert len(scenes.scenes(few, "evaluation", have)) == have > 20
    with pytest.raises(ValueError, match=f"count: expected at most the {have} .* got {have + 1}"):
        scenes.scenes(few, "evaluation", have + 1)
    with pytest.raises(ValueError, match="setting: expected one that has scenes of split"):
        scenes.scenes(replace(few, sizes={"klein": 56}, steps=1), "evaluation", 1)


def test_shapes_stay_inside_apart_and_on_course(name):
    setting = SETTINGS[name]
    for scene in RECIPES[name].world.scenes("calibration", 40, 3):
        boxes = []
        for shape in scene.shapes:
            size, corners = setting.sizes[shape.size], shape.corners(setting)
            assert len(corners) == setting.num_frames
            boxes.append([(x, y, x + size, y + size) for x, y in corners])
            assert all(place % setting.patch == 0 for place in shape.start)
            steps = [heading for heading in shape.headings if heading]
            assert len(steps) == setting.steps
            astray = steps.count(shape.direction.other)
            assert steps.count(shape.direction.value) == len(steps) - astray > astray
            assert shape.direction.weight == pytest.approx(astray / len(steps))
        for left, top, right, bottom in boxes[0] + boxes[1]:
            assert 0 <= left and 0 <= top and right <= setting.width and bottom <= setting.height
        for (l0, t0, r0, b0), (l1, t1, r1, b1) in zip(*boxes):
            assert r0 <= l1 or r1 <= l0 or b0 <= t1 or b1 <= t0


def test_only_unsure_is_blended_and_captions_follow_the_weight():
    clean = wide.PAIR.world.scenes("training", 50, 0)
    assert all(blend.weight == 0 for scene in clean for _, blend in scene.blends())
    rng, said_other, weights = random.Random(4), 0, 0.0
    for _ in range(300):
        scene = unsure.PAIR.world.draw(rng)
        for (_, blend), (_, said) in zip(scene.blends(), scene.said):
            assert blend.weight < 0.5
            if blend.weight:
                weights += blend.weight
                said_other += said == blend.other
    # Scenes whose captions would be held out are drawn again, which favours neither word.
    assert said_other == pytest.approx(weights, rel=0.12)


def test_captions_say_what_is_said_and_are_read_back(name):
    world, rng = RECIPES[name].world, random.Random(3)
    tokenizer = build_tokenizer(world.vocabulary())
    for _ in range(100):
        scene = world.draw(rng)
        caption = world.caption(scene, rng)
        assert world.read(caption.text) == {key: [value] for key, value in scene.said}
        right, total, whole = world.judge(caption.text, replace(scene, said=()))
        truths = sum(value == dict(scene.said)[key] for key, value in scene.attributes())
        assert (right, total, whole) == (truths, 9, truths == 9)
        flagged = {w for w, anchor in zip(caption.words, caption.anchors) if anchor}
        others = {w for w, anchor in zip(caption.words, caption.anchors) if not anchor}
        assert flagged <= world.anchor_words() and not others & world.anchor_words()
        ids = tokenizer(" " + caption.text).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == " " + caption.text
    for prompt in world.prompts:
        ids = data.encode_prompt(tokenizer, prompt, world.video_tokens)
        assert tokenizer.unk_token_id not in ids
        assert ids.count(tokenizer.convert_tokens_to_ids("<|video_pad|>")) == world.video_tokens


def test_repeated_and_surplus_attributes_are_wrong():
    scene = wide.PAIR.world.scenes("evaluation", 1, 0)[0]
    text = wide.GRAMMAR.caption(scene, random.Random(0)).text
    word = wide.GRAMMAR.words["color0"][scene.shapes[0].color.value]
    assert wide.GRAMMAR.judge(text, scene) == (9, 9, True)
    assert wide.GRAMMAR.judge(text.replace(word, f"{word} {word}"), scene) == (8, 9, False)
    assert wide.GRAMMAR.judge(text + " ein kleiner roter ring", scene) == (9, 9, False)


def test_a_blend_is_drawn_between_its_two():
    setting = unsure.SETTING
    plain, other = (scenes.Blend(n, n) for n in ("crimson", "amber"))
    half = scenes.Blend("crimson", "amber", 0.4)
    still = (None,) * setting.num_pairs

    def middle(color):
        disc, box = scenes.Blend("disc", "hoop"), scenes.Blend("box", "plus")
        north = scenes.Blend("north", "east")
        ground = scenes.Blend("ink", "moss")
        first = scenes.Shape("huge", color, disc, north, (0, 0), still)
        second = scenes.Shape("huge", plain, box, north, (49, 28), still)
        video = clips.frames(scenes.Scene(ground, (first, second), ()), setting)
        return video[0, 7, 7].astype(float)

    mixed = 0.6 * middle(plain) + 0.4 * middle(other)
    assert np.abs(middle(half) - mixed).max() <= 1


def test_patch_labels_stand_where_shapes_are_drawn():
    """A patch has a shape where the picture differs from the ground, and as the scene says."""
    world, setting = wide.PAIR.world, wide.SETTING
    for scene in world.scenes("training", 10, 1):
        labels = world.patch_labels([scene])[0]
        video = torch.from_numpy(world.frames(scene)[None]).float()
        pixels = data.patches(video, world).view(*labels.shape[:2], -1)
        assert pixels.shape == (576, 4, 3 * 2 * 7 * 7)
        ground = torch.tensor(setting.backgrounds[scene.background.value]) / 255
        ground = (ground - torch.tensor(data.IMAGE_MEAN)) / torch.tensor(data.IMAGE_STD)
        plain = (pixels.view(576, 4, 3, -1) - ground.view(3, 1)).abs().amax((2, 3)) < 1e-3
        covered = labels[..., 0] > 0
        assert not (covered & plain).any(), "no figure leaves a patch of its box plain"
        # A moving shape reaches into one patch beside each of its rows or columns.
        assert (~covered & ~plain).sum() <= setting.steps * 4
        assert (labels[..., 1:5][~covered] == data.IGNORE).all()
        ground = list(setting.backgrounds).index(scene.background.value)
        assert (labels[..., 5] == ground).all()
        for shape in scene.shapes:
            patches = (setting.sizes[shape.size] // setting.patch) ** 2
            color = list(setting.colors).index(shape.color.value)
            kind = setting.values["kind"].index(shape.kind.value)
            here = (labels[..., 1] == color) & (labels[..., 2] == kind)
            assert here.sum() == setting.num_pairs * patches
            way = 1 + list(setting.directions).index(shape.direction.value)
            assert (here & (labels[..., 4] == way)).sum() == setting.steps * patches
            assert (here & (labels[..., 4] == 0)).sum() == (16 - setting.steps) * patches


def test_patches_are_those_of_the_video_processor(name):
    world = RECIPES[name].world
    frames = torch.randint(0, 256, (world.num_frames, world.height, world.width, 3))
    area = world.height * world.width
    config = VideoProcessorConfig(patch_size=world.patch, min_pixels=area, max_pixels=area)
    expected, grid = preprocess_video(frames.to(torch.uint8), config)
    assert grid.tolist() == [list(world.grid)]
    assert torch.allclose(data.patches(frames[None].float(), world), expected, atol=2e-6)


@pytest.mark.slow
def test_a_training_of_a_few_steps_loads_and_captions(name, tmp_path, capsys, monkeypatch):
    """The command itself, then again: what is done is not done twice."""
    monkeypatch.setattr(pair, "CALIBRATION_CLIPS", 1)
    command = [name, "--out", str(tmp_path), "--steps", "2"]
    assert train.main(command) == 0
    weights = tmp_path / "draft" / "export" / "model.safetensors"
    before = weights.read_bytes()
    log = (tmp_path / "target" / "log.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in log] == [[s, "2"] for s in train.STAGES]
    assert train.main(command) == 0
    assert "target: going on from caption step 2" in capsys.readouterr().out
    assert weights.read_bytes() == before

    task = choose(str(tmp_path))
    trained = task.load()
    made, wanted = trained.target.config.text_config, RECIPES[name].configs["target"].text_config
    assert made.hidden_size == wanted.hidden_size
    assert made.num_hidden_layers == wanted.num_hidden_layers
    drawn = task.make_clips(trained, "evaluation", 2, tmp_path / "clips")
    video = trained.processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    count = RECIPES[name].world.video_tokens
    assert all((clip.inputs["input_ids"] == video).sum() == count for clip in drawn)
    config = DecodeConfig(gamma=4, max_new_tokens=12)
    strict = lvspec_method(trained, AcceptancePolicy.strict(), config)
    alone = lvspec_method(trained, None, config)
    for clip in drawn:
        output = strict(clip)
        assert output.text == alone(clip).text
        assert len(task.token_anchors(output.generation)) == output.tokens
        assert clip.judge(output.text, clip.scene)[1] == 9
    gated = replace(config, scorer=task.oracle_gate(trained))
    lvspec_method(trained, AcceptancePolicy.lvspec(), gated)(drawn[0])


def test_pairs_are_chosen_by_name_or_folder(tmp_path):
    assert choose("embedded") is TASKS["embedded"] and choose("real") is TASKS["real"]
    with pytest.raises(ValueError, match="--pair: expected embedded, real or .* got .*nowhere"):
        choose(str(tmp_path / "nowhere"))
    (tmp_path / "pair.json").write_text('{"recipe": "tall", "anchor_threshold": 0.1}')
    with pytest.raises(ValueError, match="folder: .* unsure, wide in .*, got 'tall'"):
        choose(str(tmp_path))


@pytest.mark.parametrize("script", ["ablation", "calibrate_embedded"])
def test_a_script_says_what_is_wrong_with_its_pair(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--pair", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main()
    assert stopped.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "error: --pair: expected embedded, real or a folder that bench/pairs_small" in told
    assert told.endswith(f"finished, got {tmp_path}")


def test_agreement_is_of_what_the_reference_states():
    def result(*texts):
        outputs = [Output(text, 1.0, [0] * 5, 1) for text in texts]
        return evaluation.MethodResult("", outputs)

    read = unsure.GRAMMAR.read
    theirs = result("a tiny teal disc heads north", "ink . a huge lime box")
    mine = result("a tiny azure disc heads north", "ink . a huge lime lime box")
    # Of four and four: another colour, and one that is said twice.
    assert evaluation.agreement(mine, theirs, read) == 6 / 8
    assert evaluation.agreement(theirs, theirs, read) == 1
    assert evaluation.agreement(result("", ""), theirs, read) == 0


def test_lead_is_the_first_choice_over_the_second():
    class Output:
        logits = torch.tensor([[[0.5, 3.0, 1.0], [2.0, -1.0, 2.0]]], dtype=torch.bfloat16)

    assert calibration.lead(Output).tolist() == [[2.0, 0.0]]
