"""`make train-real`, command by command, on a language model of two layers."""

import itertools
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from real_models import needs_gguf, tiny_llama, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from lvspec.shapes.real import model, pair, replay, train, weights, write

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"
STEPS = 2


def commands():
    """(script, arguments) of every command of the recipe, in order."""
    recipe = MAKEFILE.read_text().partition("\ntrain-real:")[2].partition("\n\n")[0]
    for line in recipe.splitlines()[1:]:
        loop = re.fullmatch(r"\tfor (\w+) in (.*); do (.*) \|\| exit 1; done", line)
        name, values, command = loop.groups() if loop else ("", "once", line)
        for value in values.split():
            words = shlex.split(command.replace(f"$${name}", value).rpartition("$(REAL)/")[2])
            yield words[0], words[1:]


def with_value(arguments, option, value):
    """The arguments with this value of an option, which need not be there."""
    kept = itertools.takewhile(lambda word: word != option, arguments)
    head = list(kept)
    return [*head, option, str(value), *arguments[len(head) + 2 :]]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two layers as wide as SmolLM2's, few tokens; weights and shipped files are elsewhere."""
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    tokenizer = weights.read_tokenizer(tmp_path / "tiny.gguf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=model.HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    text = LlamaForCausalLM(config).model.state_dict()
    monkeypatch.setattr(train, "find_gguf", lambda: None)
    monkeypatch.setattr(train, "read_tokenizer", lambda path: tokenizer)
    monkeypatch.setattr(train, "read_weights", lambda path: text)
    for module in (train, model):
        monkeypatch.setattr(module, "VOCABULARY", 300)
    texts = partial(replay.write_texts, count=8, length=12)
    monkeypatch.setattr(train, "write_texts", texts)
    short = dict.fromkeys(train.SHARES, (1.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(train, "SHARES", short)
    few = {f"{stage}_batch_tokens": 300 for stage in ("see", "ideal", "joint")}
    for role, layers in (("target", (0, 1)), ("draft", (1,))):
        recipe = replace(train.RECIPES[role], layers=layers, rank=2, **few)
        monkeypatch.setitem(train.RECIPES, role, recipe)
    for module in (write, pair):
        monkeypatch.setattr(module, "adapter_file", lambda role: tmp_path / f"{role}.safetensors")
    return tokenizer, text


@needs_gguf
@pytest.mark.slow
def test_every_command_of_train_real(small, tmp_path):
    tokenizer, text = small
    out, done = tmp_path / "runs", []
    for script, arguments in commands():
        arguments = with_value(arguments, "--out", out)
        if script == "train.py":
            arguments = with_value(arguments, "--steps", STEPS)
        elif "captions" in arguments:
            arguments = with_value(arguments, "--clips", 4)
        assert {"train.py": train, "write.py": write}[script].main(arguments) == 0
        done.append(" ".join(arguments[:2] if "captions" not in arguments else arguments[:1]))
    stages = ("see", "ideal", "joint")
    learnt = {role: [f"{role} {stage}" for stage in stages] for role in ("target", "draft")}
    written = ["adapters target", "adapters draft"]
    assert done == [*learnt["target"], "captions", *learnt["draft"], *written]
    for role in learnt:
        for stage in stages:
            state = torch.load(out / f"{role}-{stage}.pt", weights_only=True)
            assert state["step"] == STEPS
        adapters, facts = pair.load_adapters(tmp_path / f"{role}.safetensors")
        joint = torch.load(out / f"{role}-joint.pt", weights_only=True)["adapters"]
        assert all(torch.equal(adapters[name], joint[name].half()) for name in joint)
        built = pair.assemble(text, tokenizer, adapters, facts)
        assert built.config.text_config.num_hidden_layers == len(train.RECIPES[role].layers)
    assert len(torch.load(out / "captions.pt", weights_only=False)) == 4
    assert torch.load(out / "texts.pt").shape == (8, 12)
    # The same command again goes on where it was.
    again = ["draft", "joint", "--out", str(out), "--steps", str(STEPS + 1)]
    assert train.main(again) == 0
    assert torch.load(out / "draft-joint.pt", weights_only=True)["step"] == STEPS + 1
    assert len((out / "draft-joint.log").read_text().splitlines()) == STEPS + 1
