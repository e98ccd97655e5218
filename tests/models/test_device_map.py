"""A target over several devices, or partly on disk: `load_pair(device_map=...)`."""

import copy
from pathlib import Path

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, DynamicTree, generate
from lvspec.models import loading
from lvspec.models.loading import load_pair

SCRIPT = Path(__file__).parents[1] / "support" / "two_devices.py"
OPTIONS = {
    "policy": AcceptancePolicy.strict(),
    "config": DecodeConfig(gamma=4, max_new_tokens=12, eos_ids=()),
}

hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_one_device(random_pair_folders, random_pair, make_prompt, hf_greedy, device_map):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("goes to a GPU here")
    pair = load_pair(*random_pair_folders, device_map=device_map)
    assert pair.target.device == pair.draft.device == torch.device("cpu")
    inputs = make_prompt(3, ("video", 2, 6, 6), 5)
    wanted = hf_greedy(random_pair[0], inputs, 12)
    assert generate(pair.target, pair.draft, inputs, **OPTIONS).tokens[0].tolist() == wanted


def test_a_layer_that_is_on_disk(
    random_pair_folders, random_pair, make_prompt, hf_greedy, tmp_path, monkeypatch
):
    """As where memory is short; accelerate brings its weights when they are needed."""
    monkeypatch.chdir(tmp_path)
    text = "model.language_model"
    places = {"model.visual": "cpu", f"{text}.embed_tokens": "cpu", f"{text}.norm": "cpu"}
    places |= {f"{text}.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"{text}.layers.0": "cpu", f"{text}.layers.1": "disk"}
    pair = load_pair(*random_pair_folders, device_map=places)
    assert {weight.device.type for weight in pair.target.parameters()} == {"cpu", "meta"}
    inputs = make_prompt(3, ("video", 2, 6, 6), 5)
    wanted = hf_greedy(random_pair[0], inputs, 12)
    options = {**OPTIONS, "config": DecodeConfig(12, max_new_tokens=12, eos_ids=(), capture=False)}
    assert generate(pair.target, pair.draft, inputs, **options).tokens[0].tolist() == wanted


def test_a_beginning_that_is_on_disk(random_pair_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"model.visual": "disk", "model.language_model": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="^device_map: expected the first modules of the target "):
        load_pair(*random_pair_folders, device_map=places)


def test_the_draft_follows(random_pair_folders, monkeypatch):
    devices = []
    load_model = loading.load_model

    def load(folder, role, *, device=None, device_map=None, **options):
        devices.append((role, device, device_map))
        return load_model(folder, role, device=device, device_map=device_map, **options)

    monkeypatch.setattr(loading, "load_model", load)
    pair = load_pair(*random_pair_folders, device_map={"": "cpu"})
    assert devices == [("target", None, {"": "cpu"}), ("draft", torch.device("cpu"), None)]
    assert pair.processor.device == pair.draft_processor.device == torch.device("cpu")


def test_one_of_the_two(random_pair_folders):
    message = "^device, device_map: expected one of them, got device='cpu' and device_map='auto'$"
    with pytest.raises(ValueError, match=message):
        load_pair(*random_pair_folders, device="cpu", device_map="auto")


@pytest.mark.slow
def test_no_tensors_of_two_devices_meet(fake_cuda, random_pair_folders):
    done = fake_cuda(*random_pair_folders, script=SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "eager: the weights of the target are on several devices\n"


GATED = AcceptancePolicy(anchor_threshold=0.14, top_k=5, shift_window=2)
WAYS = {
    "chain": ("model", AcceptancePolicy.strict(), {"gamma": 4}),
    "tree, loose": ("model", GATED, {"tree": DynamicTree(2, 3)}),
    "self, loose": ("self", GATED, {"gamma": 3, "draft_keep": 0.5}),
    "n-grams": ("ngram", AcceptancePolicy.strict(), {"gamma": 4}),
}


@pytest.mark.parametrize("way", WAYS)
def test_hooks_that_take_inputs_along(pair, make_prompt, way):
    """What accelerate leaves on a model over several GPUs; here all of them are the CPU."""
    dispatched = copy.deepcopy(pair[0])
    text = dispatched.model.language_model
    for module in (*text.layers, text.norm, dispatched.lm_head):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    who, policy, options = WAYS[way]
    config = DecodeConfig(max_new_tokens=12, eos_ids=(), **options)
    inputs = [make_prompt(3, ("video", 2, 6, 6), 5), make_prompt(9, ("video", 2, 4, 4), 2)]
    draft = pair[1] if who == "model" else who
    wanted = generate(pair[0], draft, inputs, policy=policy, config=config)
    with pytest.warns(RuntimeWarning, match="passes of the target are HF's own, slower: .*forward"):
        found = generate(dispatched, draft, inputs, policy=policy, config=config)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.tokens.equal(theirs.tokens) and ours.kinds.equal(theirs.kinds)
        assert ours.stats.passes["target"].startswith("HF's: ")
        assert ours.stats.loop.startswith("eager: ")
