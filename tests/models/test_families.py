"""Every family: HF's greedy tokens from a tiny random checkpoint of the real class.

In float64, so that no two logits are equal but for rounding.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import ranks as support
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from lvspec import AcceptancePolicy, DecodeConfig, DynamicTree, generate, ops
from lvspec.engine.frames import frame_attention
from lvspec.models.attention import lvspec_attention_on
from lvspec.models.families import FAMILIES
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.ops import active_backend
from lvspec.tree import ancestors_from_parents, depths, paths

ROWS = 160  # of the target's vocabulary; other drafts have fewer, as in Qwen2.5-VL
FEWER_ROWS = 152
START, END, IMAGE, VIDEO, FIRST_WORD = 3, 4, 5, 6, 8
TREE = torch.tensor([-1, 0, 0, 1, 1, 2, 5], dtype=torch.int32)


class Prompt:
    """A prompt under way: ids, and pixels of every kind in order."""

    def __init__(self, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.ids, self.images, self.videos = [], [], []

    def words(self, count):
        self.ids += torch.randint(FIRST_WORD, FEWER_ROWS, (count,), generator=self.rng).tolist()

    def placeholders(self, token, count):
        self.ids += [START] + [token] * count + [END]

    def noise(self, *shape):
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def inputs(self, **found):
        ids = torch.tensor([self.ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **found}


def qwen_prompt(prompt, parts, *, frames_apart=False, seconds=None):
    """Grids of patches of 4x4 pixels and 2 frames; four patches are a token."""
    for part in parts:
        if isinstance(part, int):
            prompt.words(part)
        elif part[0] == "image":
            prompt.images.append([1, *part[1:]])
            prompt.placeholders(IMAGE, part[1] * part[2] // 4)
        else:
            time, height, width = part[1:]
            prompt.videos.append([time, height, width])
            for _ in range(time if frames_apart else 1):
                prompt.words(2 if frames_apart else 0)  # Qwen3-VL writes the seconds
                tokens = height * width // 4
                prompt.placeholders(VIDEO, tokens if frames_apart else time * tokens)
    found = {}
    for name, pixels, grids in (
        ("image", "pixel_values", prompt.images),
        ("video", "pixel_values_videos", prompt.videos),
    ):
        if grids:
            found[f"{name}_grid_thw"] = torch.tensor(grids)
            found[pixels] = prompt.noise(int(torch.tensor(grids).prod(1).sum()), 3 * 2 * 4 * 4)
    if seconds is not None and prompt.videos:
        found["second_per_grid_ts"] = torch.full((len(prompt.videos),), seconds)
    inputs = prompt.inputs(**found)
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def llava_prompt(prompt, parts, *, video_extra, patches_alone):
    """Squares of 16x16 pixels, 16 patches each; a frame of a video is pooled to 4."""
    sizes = []
    several = sum(not isinstance(part, int) and part[0] == "image" for part in parts) > 1
    for part in parts:
        if isinstance(part, int):
            prompt.words(part)
        elif part[0] == "image":
            rows, columns = part[1] // 4, part[2] // 4
            sizes.append([16 * rows, 16 * columns])
            if several and patches_alone:  # LLaVA-OneVision cuts up an image that is alone
                prompt.images.append(prompt.noise(1, 3, 16, 16))
                prompt.placeholders(IMAGE, 16 + 1)
            else:
                prompt.images.append(prompt.noise(1 + rows * columns, 3, 16, 16))
                prompt.placeholders(IMAGE, 16 + 4 * rows * (4 * columns + 1))
        else:
            prompt.videos.append(prompt.noise(part[1], 3, 16, 16))
            prompt.placeholders(VIDEO, 4 * part[1] + video_extra)
    found = {}
    if prompt.images:
        most = max(len(pixels) for pixels in prompt.images)
        padded = [
            torch.nn.functional.pad(pixels, (0,) * 7 + (most - len(pixels),))
            for pixels in prompt.images
        ]
        found |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
        if patches_alone:
            found["batch_num_images"] = torch.tensor([len(sizes)])
    if prompt.videos:
        found["pixel_values_videos"] = torch.stack(prompt.videos)
    return prompt.inputs(**found)


def frames_prompt(prompt, parts, *, arrange):
    """A video is so many images of 16x16 pixels, 4 tokens each, with words between them."""
    for part in parts:
        if isinstance(part, int):
            prompt.words(part)
            continue
        for _ in range(part[1] if part[0] == "video" else 1):
            prompt.words(1)
            prompt.images.append(prompt.noise(3, 16, 16))
            prompt.placeholders(IMAGE, 4)
    return prompt.inputs(**(arrange(torch.stack(prompt.images)) if prompt.images else {}))


def padded_frames(frames):
    """The right half of the first is padding."""
    mask = torch.ones(1, len(frames), 16, 16, dtype=torch.bool)
    mask[0, 0, :, 8:] = False
    return {"pixel_values": frames[None], "pixel_attention_mask": mask}


@dataclass(frozen=True)
class Tiny:
    """A checkpoint of a family: its configuration and a maker of prompts."""

    config: dict
    prompt: Callable
    text: dict
    options: dict


_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_QWEN_IDS = {**_IDS, "vision_start_token_id": START, "vision_end_token_id": END}
_QWEN_VISION = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_QWEN3_VISION = {
    **_QWEN_VISION,
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 64,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_LLAVA = {
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
}

TINY = {
    "qwen2_vl": Tiny(
        {
            "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            **_QWEN_IDS,
        },
        qwen_prompt,
        {"rope_parameters": _MROPE},
        {},
    ),
    "qwen2_5_vl": Tiny(
        {
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "fullatt_block_indexes": [0],
                "window_size": 16,
                "tokens_per_second": 2,
            },
            **_QWEN_IDS,
        },
        qwen_prompt,
        {"rope_parameters": _MROPE},
        {"seconds": 1.5},
    ),
    "qwen3_vl": Tiny(
        {
            "vision_config": _QWEN3_VISION,
            **_QWEN_IDS,
        },
        qwen_prompt,
        {"head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        {"frames_apart": True},
    ),
    "qwen3_vl_moe": Tiny(
        {
            "vision_config": _QWEN3_VISION,
            **_QWEN_IDS,
        },
        qwen_prompt,
        {
            "head_dim": 16,
            "rope_parameters": {**_MROPE, "mrope_interleaved": True},
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        {"frames_apart": True},
    ),
    "llava_onevision": Tiny(
        {
            "vision_config": {
                **_VISION,
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
            **_LLAVA,
        },
        llava_prompt,
        {"model_type": "qwen2"},
        {"video_extra": 1, "patches_alone": True},
    ),
    "llava_next_video": Tiny(
        {"vision_config": {**_VISION, "model_type": "clip_vision_model"}, **_LLAVA},
        llava_prompt,
        {"model_type": "llama"},
        {"video_extra": 0, "patches_alone": False},
    ),
    "internvl": Tiny(
        {
            "vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
        },
        frames_prompt,
        {"model_type": "qwen2"},
        {"arrange": lambda frames: {"pixel_values": frames}},
    ),
    "smolvlm": Tiny(
        {"vision_config": _VISION, "image_token_id": IMAGE, "scale_factor": 2},
        frames_prompt,
        {"model_type": "llama"},
        {"arrange": padded_frames},
    ),
}

PROMPTS = {
    "text": (7,),
    "clip": (3, ("video", 3, 4, 8), 4),
    "image": (("image", 4, 8), 5),
    "mixed": (1, ("image", 4, 8), 2, ("video", 2, 4, 4), ("image", 4, 4), ("video", 2, 8, 4), 3),
    "long": (2, ("video", 12, 4, 4), 1),
}

every_family = pytest.mark.parametrize("family", list(TINY))


def build(family, *, rows=ROWS, seed=0, text=None):
    """A random checkpoint whose next token depends on all of the context."""
    tiny = TINY[family]
    text_config = {**_TEXT, **tiny.text, "vocab_size": rows, **(text or {})}
    config = AutoConfig.for_model(
        family, text_config=text_config, tie_word_embeddings=False, **tiny.config
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = None
    if not FAMILIES[family].has_static_pass:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


def make_inputs(family, kind, seed=0):
    tiny = TINY[family]
    return tiny.prompt(Prompt(seed), PROMPTS[kind], **tiny.options)


@pytest.fixture(scope="module")
def checkpoints():
    """`checkpoints(family)`: (target, a draft of its own weights, a draft that often agrees)."""
    built = {}

    def get(family):
        if family not in built:
            target = build(family)
            near = copy.deepcopy(target)
            torch.manual_seed(2)
            with torch.no_grad():
                for parameter in near.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.003)
            built[family] = (target, build(family, rows=FEWER_ROWS, seed=1), near)
        return built[family]

    return get


def strict(target, draft, inputs, **config):
    config = DecodeConfig(**{"gamma": 4, "max_new_tokens": 20, "eos_ids": (), **config})
    return generate(target, draft, inputs, policy=AcceptancePolicy.strict(), config=config)


def with_other_rows(model, rows):
    """The same model, its vocabulary cut or padded with rows of noise."""
    other = copy.deepcopy(model)
    other.resize_token_embeddings(rows, mean_resizing=False)
    return other


def test_every_family_is_here():
    assert list(FAMILIES) == list(TINY)


@every_family
@pytest.mark.parametrize("kind", list(PROMPTS))
def test_strict_is_hf_greedy(checkpoints, hf_greedy, family, kind):
    target, other, near = checkpoints(family)
    inputs = make_inputs(family, kind)
    wanted = hf_greedy(target, inputs, 20)
    assert len(set(wanted)) > 5, "the context matters"
    for draft in (None, other, near):
        generation = strict(target, draft, inputs)
        assert generation.tokens[0].tolist() == wanted
    assert generation.stats.tau > 1.5


@pytest.mark.parametrize("fuse", ["kernels", pytest.param("none", marks=pytest.mark.slow)])
@every_family
def test_questions_behind_one_clip(checkpoints, hf_greedy, family, fuse):
    """Each has the tokens that HF gives it alone."""
    target, _, near = checkpoints(family)
    inputs = make_inputs(family, "clip")
    ids = inputs["input_ids"]
    prompts = [ids, torch.cat([ids, ids[:, -2:]], dim=1)]  # the clip ends before its last words
    config = DecodeConfig(gamma=4, max_new_tokens=8, eos_ids=(), fuse=fuse)
    options = {"policy": AcceptancePolicy.strict(), "config": config}
    found = generate(target, near, inputs, prompts=prompts, **options)
    for one, prompt in zip(found, prompts, strict=True):
        types = (prompt > -1).long()
        given = {**inputs, "input_ids": prompt, "attention_mask": types}
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            given["mm_token_type_ids"] = torch.cat([kinds, types[:, ids.shape[1] :] * 0], dim=1)
        assert one.tokens[0].tolist() == hf_greedy(target, given, 8)


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("kind", ["clip", "mixed"])
def test_other_ways_to_draft(checkpoints, hf_greedy, family, kind):
    target, _, near = checkpoints(family)
    inputs = make_inputs(family, kind)
    wanted = hf_greedy(target, inputs, 20)
    for draft, options in (
        (near, {"draft_keep": 0.3}),
        (near, {"tree": [(0,), (1,), (0, 0), (0, 1), (1, 0)]}),
        (near, {"tree": DynamicTree(2, 3)}),
        (near, {"draft_vocab": wanted[::2]}),
        ("self", {"draft_keep": 0.3}),
        ("self", {}),
        ("ngram", {}),
    ):
        generation = strict(target, draft, inputs, **options)
        assert generation.tokens[0].tolist() == wanted
        if (draft, options) == ("self", {}):
            whole = generation.stats.num_accepted[:-1]  # the last pass is cut at what was asked for
            assert set(whole) == {4}, "it sees what the target sees"


SPREAD = {
    "qwen2_vl": None,
    "llava_onevision": None,
    "llava_next_video": None,
    "internvl": {"model_type": "qwen3", "head_dim": 16},
    "smolvlm": None,
}
"""Families whose text layers transformers spreads over processes, with another text model."""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_two_processes(together, tmp_path):
    """They give what one gives; a head that is not tied may be in parts or whole."""
    folders, alone = [], {}
    for family, text in SPREAD.items():
        inputs = make_inputs(family, "clip")
        frames = 6 if "video_grid_thw" in inputs else 3
        folder = tmp_path / f"{family}-{frames}"
        target = build(family, text=text)
        target.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
        folders.append(folder)
        alone[folder.name] = support.run_family(target, folder)
    for number, process in enumerate(together("families", folders, tmp_path)):
        process.join(900)
        assert process.exitcode == 0, (tmp_path / f"families{number}.txt").read_text()[-3000:]
        found = json.loads((tmp_path / f"{number}.json").read_text())
        for name, wanted in alone.items():
            assert found[name]["tokens"] == wanted["tokens"], name
            assert found[name]["passes"] == f"own, part {number + 1} of 2"
            mass = torch.tensor(found[name]["mass"])
            torch.testing.assert_close(mass, torch.tensor(wanted["mass"]), rtol=1e-5, atol=1e-7)


@every_family
def test_attention_by_frame_is_all_that_the_video_gets(checkpoints, family):
    """The sum over frames is the loop's own score of the rows, and frames are told apart."""
    target, _, near = checkpoints(family)
    inputs = make_inputs(family, "clip")
    policy = AcceptancePolicy(anchor_threshold=1e-9)
    config = DecodeConfig(gamma=4, max_new_tokens=20, eos_ids=(), scorer="attention_mass")
    found = generate(target, near, inputs, policy=policy, config=config)
    (clip,) = [part for part in PROMPTS["clip"] if not isinstance(part, int)]
    frames = clip[1] * (2 if "video_grid_thw" in inputs else 1)
    mass = frame_attention(target, inputs, found.tokens[0].tolist(), frames=frames).mass
    assert mass.shape == (20, clip[1]) and mass.std(dim=1).min() > 0
    torch.testing.assert_close(mass[1:].sum(1).float(), found.relevance[0, 1:])


@every_family
def test_pixels_matter(checkpoints, hf_greedy, family):
    """Otherwise the test above would not see them lost."""
    target = checkpoints(family)[0]
    captions = set()
    for seed in range(2):
        inputs = make_inputs(family, "clip")
        for name in FAMILIES[family].visual_inputs:
            if name in inputs:
                inputs[name] = inputs[name] + seed
        captions.add(tuple(hf_greedy(target, inputs, 20)))
    assert len(captions) == 2


@every_family
def test_a_pruned_draft_is_not_shown_what_the_target_saw(checkpoints, family, monkeypatch):
    """It has the target's tower, weights and all; with one weight that is another it looks."""
    target, draft = checkpoints(family)[0], copy.deepcopy(checkpoints(family)[0])
    text = FAMILIES[family].text_model(draft)
    text.layers = text.layers[:1]
    text.config.num_hidden_layers = 1
    if getattr(text.config, "layer_types", None):
        text.config.layer_types = text.config.layer_types[:1]
    towers = [FAMILIES[family].tower(model) for model in (target, draft)]
    kind, seen = type(towers[0]), []
    look = kind.forward
    monkeypatch.setattr(
        kind,
        "forward",
        lambda self, *args, **kwargs: seen.append(self) or look(self, *args, **kwargs),
    )

    def found():
        seen.clear()
        generation = strict(target, draft, make_inputs(family, "mixed"), max_new_tokens=8)
        return generation, [sum(tower is each for each in seen) for tower in towers]

    spared, (of_target, of_draft) = found()
    assert of_target > 0 and of_draft == 0 and spared.stats.draft_vision == "the target's"
    with monkeypatch.context() as patch:  # the same weights, and nobody who knows
        patch.setattr("lvspec.models.tower._other_values", lambda *weights: "not compared")
        own, calls = found()
    assert calls == [of_target, of_target] and own.stats.draft_vision == "its own: not compared"
    assert torch.equal(spared.tokens, own.tokens)
    assert spared.stats.num_accepted == own.stats.num_accepted
    with torch.no_grad():
        next(towers[1].parameters()).view(-1)[0] += 1
    other, calls = found()
    assert calls == [of_target, of_target] and "weights are others" in other.stats.draft_vision
    assert torch.equal(other.tokens, own.tokens)


@every_family
@pytest.mark.parametrize("kind", ["text", "mixed", "long"])
def test_positions_are_those_of_greedy_decoding(checkpoints, family, kind):
    """What HF's text model is given during HF's own generate, prompt and every step."""
    model, seen = Model(checkpoints(family)[0], "target"), []
    inputs = make_inputs(family, kind)
    rows = FAMILIES[family].position_rows

    def keep(module, args, kwargs):
        positions = kwargs["position_ids"]
        seen.append(positions[None] if rows == 1 else positions[-3:].expand(3, 1, -1))

    hook = model.text.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.hf.generate(**inputs, do_sample=False, max_new_tokens=9, pad_token_id=0)
    finally:
        hook.remove()
    length = inputs["input_ids"].shape[1]
    cache = model.new_cache(batch_size=1, capacity=length + 8, num_slots=1)
    with torch.no_grad():
        model.prefill(check_inputs(model, inputs), cache, 0)
    assert cache.positions.equal(torch.cat(seen, dim=2))
    visual = torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE, VIDEO]))
    assert cache.visual[0, :length].bool().equal(visual)


@pytest.mark.parametrize(
    "family, jumps", [("qwen2_vl", 1), ("qwen2_5_vl", 1), ("qwen3_vl", 0), ("qwen3_vl_moe", 0)]
)
def test_positions_jump_after_a_long_clip(checkpoints, family, jumps):
    """By HF's `rope_deltas` they would go on behind the clip's time; its greedy goes on from the
    last token of the prompt. Qwen3-VL's frames are clips of their own, of one moment."""
    target, inputs = checkpoints(family)[0], make_inputs(family, "long")
    given = {name: inputs[name] for name in FAMILIES[family].position_inputs if name in inputs}
    positions, deltas = target.model.get_rope_index(inputs["input_ids"], **given)
    by_deltas = positions.shape[2] + int(deltas)
    assert (by_deltas > int(positions[0, 0, -1]) + 3) == bool(jumps)


@every_family
@torch.no_grad()
def test_tree_step_is_sequential_decoding(checkpoints, family):
    """Two sequences of different lengths; lvspec's own pass and HF's forward."""
    target = checkpoints(family)[0]
    prompts = [make_inputs(family, "clip"), make_inputs(family, "text", seed=1)]
    tokens = torch.randint(FIRST_WORD, FEWER_ROWS, (2, len(TREE)))
    outputs = []
    for fuse in ("none", "kernels"):
        model = Model(target, "target", fuse=fuse)
        cache = model.new_cache(batch_size=2, capacity=100, num_slots=len(TREE))
        for slot, inputs in enumerate(prompts):
            model.prefill(check_inputs(model, inputs), cache, slot)
        ancestors = ancestors_from_parents(TREE.repeat(2, 1))
        with lvspec_attention_on(model.text):
            outputs.append(model.step(tokens, depths(TREE), ancestors, cache, scores=True))
        has_plan = fuse == "kernels" and FAMILIES[family].has_static_pass
        assert (model.made.plan is not None) == has_plan
    eager, own = outputs
    for ours, theirs in zip(
        (own.logits, own.masses, own.peaks),
        (eager.logits, eager.masses, eager.peaks),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (eager.peaks[:, 0] > 0).all() and not eager.peaks[:, 1].any()
    for sequence, inputs in enumerate(prompts):
        prompt = {k: v for k, v in inputs.items() if k not in ("attention_mask", "input_ids")}
        for path in paths(TREE).tolist():
            slots = [slot for slot in path if slot >= 0]
            ids = torch.cat([inputs["input_ids"], tokens[sequence, slots][None]], dim=1)
            kinds = prompt.get("mm_token_type_ids")
            if kinds is not None:
                prompt["mm_token_type_ids"] = torch.nn.functional.pad(
                    kinds, (0, ids.shape[1] - kinds.shape[1])
                )
            mask = torch.ones_like(ids)
            target.model.rope_deltas = None
            wanted = target(input_ids=ids, attention_mask=mask, **prompt).logits[0, -len(slots) :]
            torch.testing.assert_close(eager.logits[sequence, slots], wanted, atol=1e-9, rtol=0)


@every_family
def test_vocabularies_that_are_padded_differently(checkpoints, hf_greedy, family):
    """The draft is the target, but for ids that only one of them has: they are often said."""
    model = copy.deepcopy(checkpoints(family)[0])
    with torch.no_grad():
        model.lm_head.weight[FEWER_ROWS:] *= 2
    inputs, taus, spoken = make_inputs(family, "clip"), [], []
    for rows in ((ROWS, FEWER_ROWS), (FEWER_ROWS, ROWS)):
        target, draft = (with_other_rows(model, count) for count in rows)
        wanted = hf_greedy(target, inputs, 20)
        generation = strict(target, draft, inputs, capture=False)
        assert generation.tokens[0].tolist() == wanted
        taus.append(generation.stats.tau)
        spoken.append(max(wanted))
    assert taus[0] < taus[1] > 4
    assert spoken[0] >= FEWER_ROWS > spoken[1]


TEXT_MODELS = [(family, text) for family in TINY for text in FAMILIES[family].text_types]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, text", [pair for pair in TEXT_MODELS if TINY[pair[0]].text.get("model_type")]
)
def test_text_models(hf_greedy, family, text):
    """Each that a family may have, with its own defaults: Mistral's window is 4096."""
    target = build(family, text={"model_type": text, "head_dim": 16})
    assert Model(target, "target").text.config.model_type == text
    inputs = make_inputs(family, "mixed")
    generation = strict(target, build(family, seed=1), inputs)
    assert generation.tokens[0].tolist() == hf_greedy(target, inputs, 20)


def test_a_text_model_with_other_attention_is_refused():
    target = build("internvl", text={"model_type": "gemma2", "head_dim": 16})
    message = "^target: expected a text model of qwen2 or qwen3 or llama in InternVL, got 'gemma2'"
    with pytest.raises(ValueError, match=message):
        Model(target, "target")


def test_a_sliding_window_is_full_attention_as_long_as_it_covers_all(hf_greedy):
    inputs = make_inputs("llava_next_video", "clip")
    needed = inputs["input_ids"].shape[1] + 20 + 5
    for window in (needed, needed - 1):
        target = build("llava_next_video", text={"model_type": "mistral", "sliding_window": window})
        if window < needed:
            message = f"^target: expected at most {window} positions .* got {needed}$"
            with pytest.raises(ValueError, match=message):
                strict(target, target, inputs)
        else:
            generation = strict(target, target, inputs)
            assert generation.tokens[0].tolist() == hf_greedy(target, inputs, 20)


@every_family
def test_inputs_that_a_family_does_not_take(checkpoints, family):
    model = Model(checkpoints(family)[0], "target")
    inputs = make_inputs(family, "clip")
    for name in ("pixels", "position_ids", "use_cache"):
        with pytest.raises(ValueError, match=f"^target inputs: expected .*{name}"):
            check_inputs(model, inputs | {name: torch.zeros(1)})
    hints = {"mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}
    hints["second_per_grid_ts"] = torch.ones(1)
    left = check_inputs(model, {**hints, **inputs})
    taken = set(FAMILIES[family].position_inputs)
    assert left.keys() & hints.keys() == (hints.keys() & taken)


class ByteLinear(torch.nn.Module):
    """A quantised layer: bytes and scales in buffers."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("bytes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        weight = self.bytes.to(x.dtype) * self.scale.to(x.dtype)
        return torch.nn.functional.linear(x, weight, self.bias)


class ByteWeight(torch.Tensor):
    """A quantised weight: a tensor of its own class, which computes with bytes and scales."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.bytes = (weight / self.scale).round().to(torch.int8)

    def float_weight(self):
        return self.bytes.to(self.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            weight = args[1].float_weight()
            return function(args[0], weight, *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of a quantised weight")


def quantise(model, kind):
    for module in list(Model(model, "target").text.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, torch.nn.Linear):
                continue
            if kind == "module":
                setattr(module, name, ByteLinear(child))
            else:
                weight = ByteWeight(child.weight.detach())
                child.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["module", "weight"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_quantised_checkpoints_run(hf_greedy, family, kind):
    """What bitsandbytes and torchao put in the place of a layer or of its weight."""
    plain = build(family)
    target = quantise(copy.deepcopy(plain), kind)
    inputs = make_inputs(family, "mixed")
    wanted = hf_greedy(target, inputs, 20)
    for draft in (None, plain):
        assert strict(target, draft, inputs).tokens[0].tolist() == wanted
    model = Model(target, "target")
    if kind == "weight":
        assert model.made.parts == {"layers": 2, "called": 14, "compact": 0}
    else:  # a class of somebody else's, who may have changed anything
        assert model.made.passes.startswith("HF's: the code of ByteLinear is of ")
        assert model.step_bytes < 0.3 * Model(plain, "plain").step_bytes, "a byte of eight"
    assert strict(plain, target, inputs).tokens[0].tolist() == hf_greedy(plain, inputs, 20)


def narrow(inputs, dtype=torch.float32):
    return {
        name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def as_on_a_gpu(monkeypatch):
    """Operations are chosen as for Triton; what C++ there is takes float32."""
    for name in ("lvspec.ops.model_parts", "lvspec.ops"):
        monkeypatch.setattr(f"{name}.active_backend", lambda device_type: "triton")
    taken = torch.float32
    monkeypatch.setattr("lvspec.ops.model_parts._takes", lambda device_type, dtype: dtype == taken)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@every_family
def test_parts_in_use(checkpoints, monkeypatch, family, backend):
    """As the statistics have them, for both ends of the range of transformers."""
    if backend == "cpp" and active_backend("cpu") != "cpp":
        pytest.skip("the C++ operations are not there")
    if backend == "triton":
        as_on_a_gpu(monkeypatch)
    target, draft, _ = (copy.deepcopy(model).float() for model in checkpoints(family))
    inputs = narrow(make_inputs(family, "clip"))
    none = {"layers": 0, "called": 0, "compact": 0}
    if FAMILIES[family].has_static_pass:
        expected, passes = none | {"layers": 2}, "own: one operation" if backend == "cpp" else "own"
    else:
        expected, passes = none, "HF's: experts are chosen by value"
    stats = strict(target, draft, inputs).stats.to_dict()
    assert stats["parts"] == {"target": expected, "draft": expected}
    assert stats["passes"] == {"target": passes, "draft": passes}
    stats = strict(target, None, inputs, fuse="none").stats.to_dict()
    assert stats["parts"] == {"target": none}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@every_family
def test_plans_of_other_types(checkpoints, family, dtype):
    """Angles whose frequencies are rounded are made by HF's module."""
    if not FAMILIES[family].has_static_pass:
        pytest.skip("its passes are HF's")
    model = Model(copy.deepcopy(checkpoints(family)[0]).to(dtype), "target")
    assert model.made.passes == "own"
    assert {type(part).__name__[-15:] for part in model.made.plan.called} <= {"RotaryEmbedding"}


@pytest.mark.slow
@every_family
def test_tokens_are_the_same_whatever_stands_in(checkpoints, hf_greedy, monkeypatch, family):
    """One operation on the CPU; and as on CUDA devices, by the specifications of the kernels."""
    target, draft, _ = (copy.deepcopy(model).float() for model in checkpoints(family))
    inputs = narrow(make_inputs(family, "mixed"))
    wanted = hf_greedy(target, inputs, 20)
    for fuse in ("none", "kernels"):
        assert strict(target, draft, inputs, fuse=fuse).tokens[0].tolist() == wanted
    as_on_a_gpu(monkeypatch)
    target, draft = copy.deepcopy(target), copy.deepcopy(draft)
    Model(target, "target").made  # noqa: B018
    calls = []

    def seen(name):
        code = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *given: calls.append(name) or code(*given))

    for name in ("norm_linear", "norm_gated_linear", "linear_add_", "rotate_and_write"):
        seen(name)
    got = strict(target, draft, inputs, fuse="kernels")
    assert got.tokens[0].tolist() == wanted
    if FAMILIES[family].has_static_pass:
        count = calls.count("rotate_and_write")
        assert count > 50 and calls.count("linear_add_") == 2 * count
        assert calls.count("norm_linear") == calls.count("norm_gated_linear") == count
    else:
        assert not calls


def test_a_draft_of_another_family(checkpoints, hf_greedy):
    """With the same inputs, or with its own, as long as the prompt has as many tokens."""
    target, draft = checkpoints("qwen2_5_vl")[0], checkpoints("qwen2_vl")[0]
    inputs = make_inputs("qwen2_5_vl", "mixed")
    wanted = hf_greedy(target, inputs, 20)
    assert strict(target, draft, inputs).tokens[0].tolist() == wanted
    other = checkpoints("llava_onevision")[0]
    with pytest.raises(ValueError, match="^draft inputs: expected inputs that LLaVA-OneVision"):
        strict(target, other, inputs)
    config = DecodeConfig(gamma=4, max_new_tokens=20, eos_ids=())
    given = {"policy": AcceptancePolicy.strict(), "config": config}
    own = make_inputs("llava_onevision", "mixed")
    with pytest.raises(ValueError, match="^draft_inputs: expected a prompt of .* tokens like the"):
        generate(target, other, inputs, draft_inputs=own, **given)
    length = inputs["input_ids"].shape[1]
    own = TINY["llava_onevision"].prompt(
        Prompt(), (length - 9 - 2, ("video", 2)), **TINY["llava_onevision"].options
    )
    assert own["input_ids"].shape[1] == length
    generation = generate(target, other, inputs, draft_inputs=own, **given)
    assert generation.tokens[0].tolist() == wanted


def test_placeholders_must_be_the_targets(checkpoints):
    inputs = make_inputs("qwen2_5_vl", "text")
    message = r"^draft: expected the target's image and video token ids \(5, 6\), got \(5,\)"
    with pytest.raises(ValueError, match=message):
        strict(checkpoints("qwen2_5_vl")[0], checkpoints("smolvlm")[0], inputs)


@pytest.mark.slow
def test_iterations_stay_on_the_device(fake_cuda, tmp_path):
    """HF's forward of every family, on CUDA tensors without values."""
    folders = []
    for family in TINY:
        if FAMILIES[family].has_static_pass:  # others choose experts in Python
            for name, rows in (("target", ROWS), ("draft", FEWER_ROWS)):
                folders.append(tmp_path / f"{family}-{name}")
                build(family, rows=rows).config.save_pretrained(folders[-1])
    done = fake_cuda("chain+anchor tree", *folders)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 2 * len(folders) == 28
