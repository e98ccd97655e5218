"""Checkpoints that are published in fp8: they load and run as HF has them here.

On a machine without a GPU that is HF's fine-grained fp8, which it expands while loading, and
compressed-tensors, whose layers expand their weights as they are called.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.models.loading import load_model

pytest.importorskip("accelerate", reason="HF's fine-grained fp8 needs it")
BLOCK = 32


@pytest.fixture
def publish(random_pair_folders, tmp_path):
    """Makes a target as it would be published: e4m3 weights, with factors."""

    def make(narrow, suffix, **quantization):
        folder = tmp_path / "published"
        shutil.copytree(random_pair_folders[0], folder)
        tensors = {}
        for name, x in load_file(folder / "model.safetensors").items():
            if ".layers." in name and "_proj.weight" in name:
                factors = name.removesuffix("weight") + suffix
                tensors[name], tensors[factors] = narrow(x)
            else:
                tensors[name] = x.clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def by_blocks(x):
    blocks = x.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / 448
    numbers = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return numbers.view(x.shape), scale


def by_rows(x):
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU HF keeps the bytes")
def test_fine_grained_fp8(publish, random_pair, noisy_draft, make_prompt, hf_greedy):
    """It is an ordinary model then, of rounded weights: passes are lvspec's own."""
    published = publish(
        by_blocks,
        "weight_scale_inv",
        quant_method="fp8",
        activation_scheme="dynamic",
        weight_block_size=[BLOCK, BLOCK],
        modules_to_not_convert=["lm_head", "model.visual"],
    )
    target = load_model(published, "target", dtype=torch.float32, device="cpu")
    linears = [x for x in target.model.language_model.modules() if isinstance(x, nn.Linear)]
    assert {type(x) for x in linears} == {nn.Linear}
    theirs = random_pair[0].model.language_model.layers[0].mlp.up_proj.weight
    ours = target.model.language_model.layers[0].mlp.up_proj.weight
    assert 0 < (ours - theirs).abs().max() <= theirs.abs().max() / 16
    target.double().generation_config.eos_token_id = None
    prompt = make_prompt(3, ("video", 4, 6, 6), 5, dtype=torch.float64)
    config = DecodeConfig(gamma=4, max_new_tokens=24, eos_ids=())
    found = generate(
        target, noisy_draft, prompt, draft_inputs=as_float(prompt), policy=strict(), config=config
    )
    assert found.tokens[0].tolist() == hf_greedy(target, prompt, 24)
    assert found.stats.passes["target"].startswith("own")


@pytest.mark.parametrize("with_activations", [False, True], ids=["W8A16", "W8A8"])
def test_compressed_tensors(
    publish, random_pair, noisy_draft, make_prompt, hf_greedy, with_activations
):
    """HF's modules run, as the package has changed them, and that is said."""
    pytest.importorskip("compressed_tensors")
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**numbers, "strategy": "channel"}}
    if with_activations:
        group["input_activations"] = {**numbers, "strategy": "token", "dynamic": True}
    published = publish(
        by_rows,
        "weight_scale",
        quant_method="compressed-tensors",
        format="float-quantized",
        quantization_status="compressed",
        ignore=["lm_head", "re:.*visual.*"],
        config_groups={"group_0": group},
    )
    target = load_model(published, "target", dtype=torch.float32, device="cpu")
    weight = target.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float8_e4m3fn
    target.generation_config.eos_token_id = None
    prompt = make_prompt(3, ("video", 4, 6, 6), 5)
    config = DecodeConfig(gamma=4, max_new_tokens=24, eos_ids=())
    with pytest.warns(RuntimeWarning, match="target are HF's own, slower: .*compressed_tensors"):
        found = generate(target, noisy_draft, prompt, policy=strict(), config=config)
    assert found.tokens[0].tolist() == hf_greedy(target, prompt, 24)
    assert sum(found.stats.num_accepted) > 0
    assert found.stats.passes["target"].startswith("HF's: ")


def strict():
    return AcceptancePolicy.strict()


def as_float(prompt):
    return {k: v.float() if v.is_floating_point() else v for k, v in prompt.items()}
