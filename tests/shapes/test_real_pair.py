"""The real-language pair: adapters, training, loading, evaluation."""

import importlib.util
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
    needs_wheel,
    tiny_llama,
    tiny_model,
    write_gguf,
)

from lvspec.cli import main
from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import lvspec_method
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.real import (
    captions,
    data,
    evaluation,
    model,
    pair,
    replay,
    train,
    training_ops,
    weights,
)
from lvspec.shapes.tasks import TASKS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_llama())
    return weights.read_tokenizer(path)


def test_adapters_fold_into_the_weights():
    adapted, plain = tiny_model(), tiny_model()
    parameters = model.add_lora(adapted, 4, model.EVERY)
    assert len(parameters) == 2 * 2 * 7
    assert all(parameter.requires_grad for parameter in parameters)
    assert not adapted.model.language_model.embed_tokens.weight.requires_grad
    with torch.no_grad():
        for parameter in [*parameters, *adapted.model.visual.parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.arange(10)[None]
    kinds = torch.zeros_like(ids)
    before = plain.double()(input_ids=ids, mm_token_type_ids=kinds).logits
    state = model.adapter_state(adapted)
    folded = tiny_model()
    model.fold_lora(folded, state)
    wanted = adapted.double()(input_ids=ids, mm_token_type_ids=kinds).logits
    found = folded.double()(input_ids=ids, mm_token_type_ids=kinds).logits
    # Folded in float32: a weight errs by half a unit in the last place.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (before - wanted).abs().max() > 1e-2
    for name, value in adapted.model.visual.named_parameters():
        assert torch.equal(value, dict(folded.double().model.visual.named_parameters())[name])


def test_an_adapter_for_no_layer_is_named():
    plain = tiny_model()
    state = {"model.language_model.layers.7.mlp.up_proj.a": torch.zeros(4, 32)}
    with pytest.raises(ValueError, match="adapters: expected names .* got .*layers.7"):
        model.fold_lora(plain, state)


def test_adapters_come_back_as_they_were_saved(tmp_path):
    adapters = {"x.a": torch.tensor([[0.5, 1.25]]), "x.b": torch.tensor([[2.0]])}
    path = tmp_path / "adapters.safetensors"
    pair.save_adapters(path, adapters, {"layers": [0, 3]})
    found, facts = pair.load_adapters(path)
    assert facts == {"layers": [0, 3]}
    assert found["x.a"].dtype == torch.float16
    assert all(torch.equal(found[name].float(), adapters[name]) for name in adapters)
    assert [file.name for file in tmp_path.iterdir()] == ["adapters.safetensors"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode, "as readable as any file"


@pytest.mark.parametrize("absent", ["gguf", weights.PACKAGE])
def test_what_is_missing_is_named_with_how_to_install_it(monkeypatch, absent):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == absent else real("json")
    )
    with pytest.raises(ImportError, match=r"real pair: .*make real.*pip install.*got no ") as error:
        pair.load_real_pair()
    assert absent.replace("_", "-") in str(error.value).rpartition("got no")[2]


def test_the_demo_says_what_to_install(monkeypatch, tmp_path, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == weights.PACKAGE else real(name)
    )
    assert main(["demo", "--pair", "real", "--out", str(tmp_path)]) != 0
    assert weights.INSTALL in capsys.readouterr().err.replace("\n", " ")


def test_another_version_of_the_wheel_is_named(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("x", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=f"expected {weights.FILE} .* got none in"):
        pair.load_real_pair()


def fake_build(monkeypatch, tmp_path, calls):
    gguf = tmp_path / "weights.gguf"
    gguf.write_bytes(b"x")
    monkeypatch.setattr(pair, "find_gguf", lambda: gguf)
    monkeypatch.setattr(pair, "read_tokenizer", lambda path: "tokenizer")
    monkeypatch.setattr(pair, "read_weights", lambda path: {})
    monkeypatch.setattr(pair, "adapter_file", lambda role: tmp_path / f"{role}.safetensors")
    for role in pair.ROLES:
        pair.save_adapters(tmp_path / f"{role}.safetensors", {"a": torch.ones(1)}, {"layers": []})
    monkeypatch.setattr(pair, "assemble", lambda *arguments: calls.append(arguments))

    def save(model, tokenizer, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(pair, "save_checkpoint", save)


def test_checkpoints_are_built_once_and_again_for_other_adapters(monkeypatch, tmp_path):
    calls = []
    fake_build(monkeypatch, tmp_path, calls)
    cache = tmp_path / "cache"
    first = pair.build_checkpoints(cache)
    assert sorted(path.name for path in first.iterdir()) == ["draft", "target"]
    assert pair.build_checkpoints(cache) == first and len(calls) == 2
    pair.save_adapters(tmp_path / "draft.safetensors", {"a": torch.zeros(1)}, {"layers": []})
    second = pair.build_checkpoints(cache)
    assert second != first and len(calls) == 4
    assert sorted(path.name for path in cache.iterdir()) == sorted([first.name, second.name])


def test_a_build_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    fake_build(monkeypatch, tmp_path, [])
    monkeypatch.setattr(pair, "save_checkpoint", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pair.build_checkpoints(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pair.default_cache() == tmp_path / "lvspec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pair.default_cache() == tmp_path / ".cache" / "lvspec"


def test_a_frozen_norm_is_hfs_norm_and_so_is_its_gradient():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    torch.manual_seed(0)
    norm = Qwen2RMSNorm(24, eps=1e-5)
    norm.weight.data.normal_()
    mine = training_ops.FrozenRMSNorm(norm)
    x = torch.randn(3, 5, 24, requires_grad=True)
    torch.testing.assert_close(mine(x), norm(x), rtol=1e-5, atol=1e-6)
    gradient = torch.randn_like(x)
    (wanted,) = torch.autograd.grad(norm(x), x, gradient)
    (found,) = torch.autograd.grad(mine(x), x, gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_training_attention_is_hfs_eager_attention():
    plain, fast = tiny_model(), tiny_model()
    plain.model.language_model.set_attn_implementation("eager")
    training_ops.speed_up(fast.model.language_model)
    ids = torch.arange(12).view(2, 6)
    kinds = torch.zeros_like(ids)
    wanted = plain(input_ids=ids, mm_token_type_ids=kinds).logits
    found = fast(input_ids=ids, mm_token_type_ids=kinds).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    (_, first), (_, second) = (
        list(m.model.language_model.layers[0].self_attn.named_parameters())[0]
        for m in (plain, fast)
    )
    wanted.square().mean().backward()
    found.square().mean().backward()
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-4, atol=1e-7)


def test_text_is_learnt_as_by_hfs_own_loss():
    plain = tiny_model()
    ids = torch.arange(20).view(2, 10)
    kinds = torch.zeros_like(ids)
    plain.lm_head.weight = plain.model.language_model.embed_tokens.weight
    wanted = plain(input_ids=ids, mm_token_type_ids=kinds, labels=ids).loss
    found = replay.text_loss(plain.model.language_model, ids)
    torch.testing.assert_close(found, wanted)


def test_texts_are_the_models_own_and_leave_other_random_numbers_alone():
    plain = tiny_model()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    texts = replay.write_texts(plain, count=3, length=9, seed=1)
    assert torch.equal(torch.rand(3), wanted)
    assert texts.shape == (3, 9) and (texts[:, 0] == replay.DOCUMENT).all()
    assert torch.equal(texts, replay.write_texts(plain, count=3, length=9, seed=1))
    assert not torch.equal(texts, replay.write_texts(plain, count=3, length=9, seed=2))


def test_the_schedule_warms_up_holds_and_ends_at_zero():
    values = [train.schedule(step, 100) for step in range(101)]
    assert values[0] == 0.1 and values[9] == values[50] == 1.0
    assert values[75] == 0.5 and values[100] == 0.0


@needs_gguf
def test_given_captions_are_what_a_draft_learns(tokenizer):
    shown = drawn("training", 8)
    written = [(scene, f"Caption {index}.") for index, scene in enumerate(shown)]
    maker = data.GivenCaptions(written, tokenizer, 1, tokens=2000)
    for _ in range(6):
        batch = maker.next()
        for labels in batch.labels:
            text = tokenizer.decode(labels[labels != data.IGNORE], skip_special_tokens=True)
            chosen = next(scene for scene, caption in written if caption == text)
            assert chosen.format == batch.format


@needs_gguf
def test_anchors_are_told_token_by_token(tokenizer):
    text = "A red ring: it is a tiny red doughnut that moves leftwards on a gray background."

    class Result:
        tokens = torch.tensor([tokenizer(text).input_ids])

    Result.tokenizer = tokenizer
    flags = evaluation.token_anchors(Result)
    told = "".join(tokenizer.decode([i]) for i, flag in zip(Result.tokens[0], flags) if flag)
    # What comes before a word of size says nothing about a shape.
    assert told.replace(" ", "") == "tinyreddoughnutleftwardsgray"


def test_accuracy_counts_by_name():
    rng = random.Random(0)
    wrong = replace(SCENE, shapes=(replace(RED, kind="cross"), BLUE))
    texts = [captions.write_caption(scene, rng).text for scene in (SCENE, wrong)]
    found = evaluation.accuracy(texts, [SCENE, SCENE])
    assert found["captions"] == 0.5 and found["kind"] == 0.75 and found["color"] == 1.0
    assert found["attributes"] == 23 / 24


def test_both_pairs_have_a_task():
    assert sorted(TASKS) == ["embedded", "real"]
    assert TASKS["real"].anchor_threshold < TASKS["embedded"].anchor_threshold


def test_the_tree_holds_less_than_ten_megabytes():
    assert sum(pair.adapter_file(role).stat().st_size for role in pair.ROLES) < 10e6


@pytest.fixture(scope="module")
def real_pair(tmp_path_factory):
    return pair.load_real_pair(cache=tmp_path_factory.mktemp("cache"))


@needs_wheel
@pytest.mark.slow
def test_strict_says_what_hf_says(real_pair, tmp_path):
    config = DecodeConfig(gamma=8, max_new_tokens=40, trace=True)
    clip = evaluation.make_clips(real_pair, "evaluation", 1, tmp_path)[0]
    strict = lvspec_method(real_pair, AcceptancePolicy.strict(), config)(clip)
    with torch.no_grad():
        sequence = real_pair.target.generate(**clip.inputs, do_sample=False, max_new_tokens=40)
    assert torch.equal(
        strict.generation.tokens[0], sequence[0, clip.inputs["input_ids"].shape[1] :]
    )


@needs_wheel
@pytest.mark.slow
def test_the_target_is_still_a_language_model(real_pair):
    """SmolLM2 itself has 18.6 on this text, the target had 102 before it learnt plain text too."""
    tokenizer = real_pair.processor.tokenizer
    assert evaluation.perplexity(real_pair.target, tokenizer, evaluation.ENGLISH) < 25
