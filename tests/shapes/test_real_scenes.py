"""The real-language pair's world: scenes, clips, captions, and which are held out."""

import random
from dataclasses import replace

import pytest
import torch
from real_models import (
    BLUE,
    RED,
    SCENE,
    drawn,
    needs_gguf,
    tiny_llama,
    write_gguf,
)

from lvspec.shapes.real import (
    captions,
    clips,
    data,
    scenes,
    weights,
)
from lvspec.video.files import read_video


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_llama())
    return weights.read_tokenizer(path)


def test_formats_have_36_to_320_video_tokens():
    assert [clip.video_tokens for clip in scenes.FORMATS] == [36, 72, 160, 320]


def test_splits_share_no_description():
    found = {split: {s.description for s in scenes.scenes(split, 200)} for split in scenes.SPLITS}
    assert all(len(descriptions) == 200 for descriptions in found.values())
    assert not found["training"] & (found["evaluation"] | found["calibration"])
    assert not found["evaluation"] & found["calibration"]


def test_a_description_says_all_that_is_judged_and_no_more():
    moved = replace(SCENE, shapes=(replace(RED, start=(0, 56)), BLUE), format=scenes.FORMATS[1])
    assert moved.description == SCENE.description and moved.split == SCENE.split
    changes = {
        "size": "large",
        "color": "pink",
        "kind": "circle",
        "direction": "top",
        "turn": "top",
    }
    for name, value in changes.items():
        other = replace(SCENE, shapes=(replace(RED, **{name: value}), BLUE))
        assert other.description != SCENE.description
    assert replace(SCENE, background="white").description != SCENE.description


@needs_gguf
def test_training_draws_no_held_out_description(tokenizer, monkeypatch):
    """The batches themselves, not only the sampler: what a training run really sees."""
    shown = []
    monkeypatch.setattr(data, "patch_labels", lambda scene: shown.append(scene) or torch.zeros(1))
    maker = data.BatchMaker(tokenizer, 1, tokens=4000)
    for _ in range(8):
        maker.next()
    assert len(shown) > 100
    assert {scene.split for scene in shown} == {"training"}


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split: expected one of .* got 'test'"):
        scenes.random_scene(random.Random(0), "test")


def test_shapes_stay_inside_apart_and_of_different_colours():
    for scene in drawn("training", 60):
        assert 1 <= len(scene.shapes) <= 3
        assert len({shape.color for shape in scene.shapes}) == len(scene.shapes)
        owner = torch.zeros(scene.format.frames, scene.format.height, scene.format.width)
        for shape in scene.shapes:
            size = scenes.SIZES[shape.size]
            for frame, (x, y) in enumerate(shape.corners()):
                region = owner[frame, y : y + size, x : x + size]
                assert region.shape == (size, size)
                assert not region.any()
                region += 1


def test_a_shape_moves_rests_and_turns():
    assert RED.corners() == [(14 + 7 * time, 42) for time in range(8)]
    ys = [y for _, y in BLUE.corners()]
    assert ys == [0, 7, 14, 14, 14, 7, 0, 0]
    assert [BLUE.turned(pair_index) for pair_index in range(4)] == [False, False, True, True]


def test_a_turned_shape_shows_its_dot():
    plain = replace(SCENE, shapes=(replace(BLUE, start=(28, 14)),))
    straight = replace(plain, shapes=(replace(BLUE, start=(28, 14), turn=None),))
    first, second = clips.frames(plain), clips.frames(straight)
    assert (first[:4] == second[:4]).all()
    x, y = plain.shapes[0].corners()[4]
    assert (first[4, y + 13 : y + 15, x + 13 : x + 15] == 255).all()
    assert (second[4, y + 13 : y + 15, x + 13 : x + 15] != 255).any()


def test_a_clip_is_read_back_as_it_was_drawn(tmp_path):
    for scene in drawn("evaluation", 4):
        clips.write_clip(scene, tmp_path / "clip.mp4", noise=0.0)
        video = read_video(tmp_path / "clip.mp4", fps=2.0)
        assert video.frames.shape == clips.frames(scene).shape
        error = (video.frames.float() - torch.from_numpy(clips.frames(scene)).float()).abs().mean()
        assert error < 4


def test_captions_are_read_back_whole():
    rng = random.Random(3)
    for scene in drawn(None, 200):
        caption = captions.write_caption(scene, rng)
        right, total, whole = captions.judge(caption.text, scene)
        assert whole and right == total == 2 + 5 * len(scene.shapes)
        assert captions.read(caption.text).anchors == caption.anchors


def test_every_error_is_found():
    rng = random.Random(5)
    other = {
        "background": replace(SCENE, background="white"),
        "count": replace(SCENE, shapes=(RED,)),
        "size": replace(SCENE, shapes=(replace(RED, size="large"), BLUE)),
        "color": replace(SCENE, shapes=(replace(RED, color="pink"), BLUE)),
        "kind": replace(SCENE, shapes=(replace(RED, kind="cross"), BLUE)),
        "direction": replace(SCENE, shapes=(replace(RED, direction="left"), BLUE)),
        "turn": replace(SCENE, shapes=(RED, replace(BLUE, turn="left"))),
    }
    for name, scene in other.items():
        for _ in range(10):
            found, whole = captions.judge_attributes(captions.write_caption(scene, rng).text, SCENE)
            assert not whole
            assert not all(found[name])


def test_what_is_stated_twice_or_beyond_the_scene_is_no_whole_caption():
    text = captions.write_caption(SCENE, random.Random(0)).text
    assert captions.judge(text, SCENE)[2]
    assert not captions.judge(text + " Finally, there is a tiny pink box.", SCENE)[2]
    assert not captions.judge(text + " It is a green one.", SCENE)[2]


def test_synonyms_digits_and_words_of_several_tokens_mean_the_same():
    meanings = captions.MEANINGS
    assert meanings["doughnut"] == meanings["ring"] == meanings["donut"] == ("kind", "ring")
    assert meanings["turquoise"] == meanings["cyan"] == ("color", "cyan")
    assert meanings["leftwards"] == meanings["left"] == ("direction", "left")
    assert meanings["3"] == meanings["three"] == meanings["trio"] == ("count", 3)
