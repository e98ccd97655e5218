"""The embedded pair's world: scenes, captions, clips, batches, training."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from lvspec.shapes import captions, clips, data, scenes, train
from lvspec.shapes.real import scenes as real_scenes
from lvspec.shapes.tokenizer import SPECIAL_TOKENS, build_tokenizer
from lvspec.video import read_video
from lvspec.video.config import VideoProcessorConfig
from lvspec.video.patches import preprocess_video

RED_RING = scenes.Shape("small", "red", "ring", "right", None, (14, 42))
BLUE_CROSS = scenes.Shape("large", "blue", "cross", "bottom", "top", (56, 0))
SCENE = scenes.Scene("gray", (RED_RING, BLUE_CROSS))


def test_splits_share_no_description():
    drawn = {split: {s.description for s in scenes.scenes(split, 100)} for split in scenes.SPLITS}
    assert all(len(descriptions) == 100 for descriptions in drawn.values())
    for first in scenes.SPLITS:
        for second in scenes.SPLITS:
            assert first == second or not drawn[first] & drawn[second]


@pytest.mark.slow
def test_training_draws_no_held_out_description():
    """The batches themselves, not only the sampler: what a training run really sees."""
    held_out = {
        scene.description
        for split in ("evaluation", "calibration")
        for scene in scenes.scenes(split, 200, seed=7)
    }
    maker = data.BatchMaker(build_tokenizer(), seed=1, anchor_weight=1.0)
    seen = {scene.description for _ in range(8) for scene in maker.batch(16).scenes}
    assert len(seen) > 100
    assert not seen & held_out


def test_a_split_depends_on_every_attribute_and_on_no_position():
    moved = replace(SCENE, shapes=(replace(RED_RING, start=(0, 56)), BLUE_CROSS))
    assert moved.description == SCENE.description and moved.split == SCENE.split
    for name, value in (("size", "large"), ("color", "pink"), ("kind", "circle"), ("turn", "top")):
        other = replace(SCENE, shapes=(replace(RED_RING, **{name: value}), BLUE_CROSS))
        assert other.description != SCENE.description


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split: expected one of .* got 'test'"):
        scenes.random_scene(random.Random(0), "test")


def test_more_scenes_than_there_are_is_an_error(monkeypatch):
    """It looped for ever. Whatever draws them: the scenes of this pair, and of the real one."""
    few = [replace(SCENE, background=name) for name in scenes.BACKGROUNDS]
    for module in (scenes, real_scenes):
        monkeypatch.setattr(module, "random_scene", lambda rng, *_: rng.choice(few))
        assert len(module.scenes("evaluation", 4)) == 4
        with pytest.raises(ValueError, match="count: expected at most the 4 .*'evaluation', got 5"):
            module.scenes("evaluation", 5)


def test_positions_move_half_a_patch_a_frame_and_turn():
    assert [RED_RING.position(t) for t in (0, 1, 7)] == [(14, 42), (21, 42), (63, 42)]
    assert [BLUE_CROSS.position(t) for t in (0, 4, 6)] == [(56, 0), (56, 28), (56, 14)]


def test_drawn_scenes_stay_inside_and_apart():
    for scene in scenes.scenes("training", 200):
        boxes = []
        for time in np.arange(0, 8, 0.25):
            frame = []
            for shape in scene.shapes:
                (x, y), size = shape.position(time), scenes.SIZES[shape.size]
                assert 0 <= x <= 84 - size and 0 <= y <= 84 - size
                frame.append((x, y, size))
            boxes.append(frame)
        if len(scene.shapes) == 2:
            assert scene.shapes[0].start[0] < scene.shapes[1].start[0]
            for (x0, y0, s0), (x1, y1, s1) in boxes[::2]:
                assert x0 >= x1 + s1 or x1 >= x0 + s0 or y0 >= y1 + s1 or y1 >= y0 + s0


def test_captions_say_what_their_scene_shows():
    rng = random.Random(3)
    for scene in scenes.scenes("training", 300):
        caption = captions.write_caption(scene, rng)
        right, total, whole = captions.judge(caption.text, scene)
        assert whole and right == total == len(scene.attributes())
        flagged = {w for w, anchor in zip(caption.words, caption.anchors) if anchor}
        others = {w for w, anchor in zip(caption.words, caption.anchors) if not anchor}
        assert flagged <= captions.anchor_words() and not others & captions.anchor_words()


def test_attributes_are_read_word_by_word():
    text = (
        "Here we see two shapes on a gray surface. There is a small red ring that moves to the "
        "right and then it goes on in the same way. Next to it a large blue cross drifts to the "
        "bottom, and it swings to the top."
    )
    assert captions.judge(text, SCENE) == (12, 12, True)
    assert captions.judge(text.replace("red", "pink"), SCENE) == (11, 12, False)
    assert captions.judge(text.replace("to the top", "to the left"), SCENE) == (11, 12, False)
    # A word said twice, a contradiction and a shape too many are all wrong.
    assert captions.judge(text.replace("red ring", "red red ring"), SCENE)[0] == 11
    assert captions.judge(text + " and a large pink ring", SCENE) == (12, 12, False)
    assert captions.judge("", SCENE) == (0, 12, False)


def test_tokenizer_spells_every_caption_and_decodes_it_back():
    tokenizer = build_tokenizer()
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(8))
    rng = random.Random(5)
    for scene in scenes.scenes("evaluation", 40):
        text = " " + captions.write_caption(scene, rng).text
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode([i]) for i in ids) == text


def test_sampling_a_written_clip_finds_the_frames_of_training(tmp_path):
    path = tmp_path / "clip.mp4"
    clips.write_clip(SCENE, path)
    video = read_video(path, fps=2.0)
    assert video.frames.shape == (8, 336, 336, 3)
    config = VideoProcessorConfig(min_pixels=84 * 84, max_pixels=84 * 84)
    pixels, grid = preprocess_video(video.frames, config)
    assert grid.tolist() == [list(data.GRID)]
    trained_on = data.patches(torch.from_numpy(clips.seen_frames(SCENE)[None]).float())
    difference = (pixels - trained_on).abs()
    other = scenes.Scene("gray", (replace(RED_RING, direction="left", start=(63, 42)), BLUE_CROSS))
    control = data.patches(torch.from_numpy(clips.seen_frames(other)[None]).float())
    assert difference.mean() < 0.03
    assert difference.mean() < 0.35 * (pixels - control).abs().mean()


def test_patches_equal_those_of_the_video_processor():
    frames = torch.randint(0, 256, (2, 8, 84, 84, 3), dtype=torch.uint8)
    config = VideoProcessorConfig(min_pixels=84 * 84, max_pixels=84 * 84)
    expected = torch.cat([preprocess_video(clip, config)[0] for clip in frames])
    assert torch.allclose(data.patches(frames.float()), expected, atol=2e-6)


def test_patch_labels_of_a_scene_by_hand():
    labels = data.patch_labels([SCENE])[0]
    # Token 3 of the first pair is the patches (2..3, 0..1): the ring stands on patch (3, 1).
    color, kind, size, direction, background = labels[3, 3].tolist()
    assert (color, kind, size) == (1, scenes.KINDS.index("ring"), 0)
    assert direction == list(scenes.DIRECTIONS).index("right")
    assert background == list(scenes.BACKGROUNDS).index("gray")
    assert labels[3, 2].tolist() == [0, -100, -100, -100, background]
    # Per pair the ring covers one patch, the cross four.
    assert (labels[..., 0] > 0).sum(dim=(0, 1)).item() == 4 * (1 + 4)
    turned = list(scenes.DIRECTIONS).index("top")
    assert (labels[18:, :, 3] == turned).sum() == 2 * 4


def test_batches_label_the_caption_and_nothing_else():
    tokenizer = build_tokenizer()
    batch = data.BatchMaker(tokenizer, seed=2, anchor_weight=3.0).batch(4)
    assert batch.pixels.shape == (4 * 144, 1176)
    for ids, labels, weights in zip(batch.ids, batch.labels, batch.weights):
        first = int((labels != data.IGNORE).nonzero()[0])
        count = int((labels != data.IGNORE).sum())
        assert tokenizer.decode(ids[first]) == " assistant"
        assert torch.equal(labels[first : first + count - 1], ids[first + 1 : first + count])
        assert labels[first + count - 1] == tokenizer.eos_token_id
        anchors = tokenizer.convert_ids_to_tokens(labels[weights == 3.0].tolist())
        assert {word.strip() for word in anchors} <= captions.anchor_words()
        assert torch.equal(weights == 0, labels == data.IGNORE)


@pytest.mark.slow
def test_training_resumes_where_it_stopped(tmp_path):
    recipe = train.Recipe(3, 4, 2, 1e-3, vision_batch_size=2, warmup_steps=1)
    trainer = train.Trainer("draft", tmp_path, recipe)
    before = trainer.model.lm_head.weight.clone()
    trainer.run()
    assert (trainer.stage, trainer.step) == ("caption", 4)
    assert not torch.equal(before, trainer.model.lm_head.weight)

    again = train.Trainer("draft", tmp_path, recipe)
    assert again.resume() and (again.stage, again.step) == ("caption", 4)
    assert torch.equal(again.model.lm_head.weight, trainer.model.lm_head.weight)
    other = train.Trainer("draft", tmp_path, replace(recipe, seed=9))
    with pytest.raises(ValueError, match="out: the checkpoint .* was made by"):
        other.resume()


def test_glimpses_are_captioned_between_seeing_and_whole_clips(tmp_path):
    """By a recipe that says so; their own clips, batch size, positions and loss."""
    short = replace(data.EMBEDDED, num_frames=2, frames=lambda scene: clips.seen_frames(scene)[:2])
    short = replace(short, patch_labels=lambda shown: data.patch_labels(shown)[:, :9])
    recipe = train.Recipe(
        1, 2, 2, 1e-3, vision_batch_size=2, warmup_steps=1, glimpse_steps=3, glimpse_batch_size=5
    )
    trainer = train.Trainer("draft", tmp_path, recipe, glimpses=short)
    seen = []

    def watch(model, args, kwargs):
        seen.append((*kwargs["inputs_embeds"].shape[:2], kwargs["position_ids"]))

    trainer.model.model.language_model.register_forward_pre_hook(watch, with_kwargs=True)
    read = trainer.reader.read.weight
    before = read.clone()
    trainer.run()
    assert [size for size, _, _ in seen] == [5, 5, 5, 2, 2]
    assert max(length for _, length, _ in seen[:3]) < min(length for _, length, _ in seen[3:])
    for (_, _, positions), world in zip(seen, [short] * 3 + [data.EMBEDDED] * 2):
        time, rows, columns = world.grid
        video = positions[:, 0, train.VIDEO_START : train.VIDEO_START + world.video_tokens]
        assert video[1].unique().numel() == rows // 2 and video[2].unique().numel() == columns // 2
        after = positions[:, 0, train.VIDEO_START + world.video_tokens]
        assert (after == after[0]).all()
    log = [line.split(",")[:2] for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert log == [["vision", "1"], ["glimpse", "3"], ["caption", "2"]]
    assert not torch.equal(before, read)


def test_the_embedded_pair_has_no_glimpses(tmp_path):
    assert all(recipe.glimpse_steps == 0 for recipe in train.RECIPES.values())
    recipe = train.Recipe(1, 1, 2, 1e-3, vision_batch_size=2, warmup_steps=1)
    train.Trainer("draft", tmp_path, recipe).run()
    log = [line.split(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert log == ["vision", "caption"]


def test_schedule_warms_up_and_ends_at_zero():
    rates = [train.schedule(step, 100, 10) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
