"""Checkpoints that are not all there: refused by name, before or instead of random numbers."""

import json
import shutil
import warnings

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lvspec.checkpoint import find_checkpoint
from lvspec.models import loading
from lvspec.models.loading import load_pair
from lvspec.video.processor import Processor

SAVED = "model.layers.1.input_layernorm.weight"  # in the file, which HF names in the old way
NORM = "model.language_model.layers.1.input_layernorm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 5\n".format("0" * 64)


@pytest.fixture
def spoil(random_pair_folders, tmp_path):
    """`spoil(role, change)`: both folders, of one a copy whose tensors `change` has changed."""

    def spoiled(role, change=None):
        folders = dict(zip(("target", "draft"), random_pair_folders))
        copy = shutil.copytree(folders[role], tmp_path / role)
        if change is not None:
            weights = load_file(copy / "model.safetensors")
            change(weights)
            save_file(weights, copy / "model.safetensors", {"format": "pt"})
        return {**folders, role: copy}

    return spoiled


def without_weights(monkeypatch):
    """From now on reading weights is an error."""

    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", read)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_missing_tensors(spoil, role):
    folders = spoil(role, lambda weights: weights.pop(SAVED))
    message = rf"^{role}: expected every weight .* in {folders[role]}, got none for 1 .*: {NORM}$"
    with pytest.raises(ValueError, match=message):
        load_pair(**folders)


def test_many_missing_tensors_are_counted(spoil):
    def halve(weights):
        for name in [name for name in weights if ".layers.1." in name]:
            del weights[name]

    with pytest.raises(ValueError, match=r"got none for 12 tensors: (\S+, ){4}\S+ and 7 more$"):
        load_pair(**spoil("target", halve))


def test_a_head_that_is_tied_is_not_missing(random_pair_folders):
    """As the fixture's checkpoints are, which `load_pair` loads everywhere else."""
    names = load_file(random_pair_folders[0] / "model.safetensors")
    assert not any("lm_head" in name for name in names)


def test_a_head_that_is_not_tied_is(spoil):
    folders = spoil("target")
    path = folders["target"] / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"got none for 1 tensors: lm_head.weight$"):
        load_pair(**folders)


def test_other_shapes(spoil):
    def cut(weights):
        weights[SAVED] = weights[SAVED][:-3].clone()

    message = rf"^target: .* shapes .*, got 1 others: {NORM} \[253\] where the config says \[256\]$"
    with pytest.raises(ValueError, match=message):
        load_pair(**spoil("target", cut))


def test_tensors_of_no_use_are_said(spoil):
    def add(weights):
        weights["more"] = torch.zeros(2)

    folders = spoil("draft", add)
    with pytest.warns(UserWarning, match=rf"^draft: {folders['draft']} has 1 .*: more$"):
        load_pair(**folders)


def test_nothing_is_said_of_whole_ones(random_pair_folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pair(*random_pair_folders)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_pointers_of_git_lfs(spoil, monkeypatch, file):
    folders = spoil("draft")
    (folders["draft"] / file).write_text(POINTER)
    without_weights(monkeypatch)
    message = rf"^draft: .* {folders['draft']}, got pointers of git-lfs for {file} \(`git lfs pull`"
    with pytest.raises(OSError, match=message):
        load_pair(**folders)


def test_pickled_weights_alone(spoil, monkeypatch):
    folders = spoil("target")
    (folders["target"] / "model.safetensors").rename(folders["target"] / "pytorch_model.bin")
    without_weights(monkeypatch)
    with pytest.raises(OSError, match=r"^target: .* safetensors .*, got pytorch_model.bin, which"):
        load_pair(**folders)
    (folders["target"] / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=rf"^target: .* in {folders['target']}, got neither$"):
        load_pair(**folders)


def test_a_shard_is_missing(spoil, monkeypatch):
    folders = spoil("target")
    folder = folders["target"]
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-{index % 2 + 1}.safetensors" for index, name in enumerate(weights)}
    for shard in set(shards.values()):
        part = {name: weights[name] for name in weights if shards[name] == shard}
        save_file(part, folder / shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    load_pair(**folders)
    (folder / "model-2.safetensors").unlink()
    without_weights(monkeypatch)
    with pytest.raises(OSError, match=r"got 1 of 2 missing: model-2.safetensors$"):
        load_pair(**folders)
    index.write_text("[]")
    with pytest.raises(ValueError, match=rf"^{index}: expected JSON with a weight_map"):
        load_pair(**folders)


def test_no_chat_template(spoil, monkeypatch):
    folders = spoil("draft")
    (folders["draft"] / "chat_template.jinja").unlink()
    without_weights(monkeypatch)
    message = rf"^draft: expected a chat template in {folders['draft']} \(chat_template.jinja\)"
    with pytest.raises(ValueError, match=message):
        load_pair(**folders)


def test_the_old_file_of_the_chat_template(spoil, random_pair_folders):
    """Read as HF's processors read it, whose tokenizers do not."""
    folders = spoil("target")
    jinja, old = (folders["target"] / f"chat_template.{end}" for end in ("jinja", "json"))
    old.write_text(json.dumps({"chat_template": jinja.read_text()}))
    jinja.unlink()
    wanted = Processor.from_pretrained(random_pair_folders[0]).chat_template
    assert load_pair(**folders).processor.chat_template == wanted
    old.write_text("{}")
    with pytest.raises(ValueError, match=rf"^{old}: expected JSON with a chat_template"):
        load_pair(**folders)


@pytest.fixture
def hub(tmp_path, monkeypatch, random_pair_folders):
    """The cache of the hub, with `somebody/small` in it; the folder of its snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--small"
    snapshot = shutil.copytree(random_pair_folders[1], cached / "snapshots" / "a1b2c3")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a1b2c3")
    return snapshot


def offline(monkeypatch):
    """From now on a connection is an error."""

    def connect(*_, **__):
        raise AssertionError("a connection is made")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)


def test_a_name_in_the_hubs_cache(hub, random_pair_folders, monkeypatch):
    offline(monkeypatch)
    assert find_checkpoint("somebody/small", "draft") == hub
    pair = load_pair(random_pair_folders[0], "somebody/small")
    assert pair.draft.config.text_config.vocab_size == 224
    assert Processor.from_pretrained("somebody/small").chat_template


def test_a_name_that_is_not_there_is_not_downloaded(hub, random_pair_folders, monkeypatch):
    offline(monkeypatch)
    message = r"^target: .* got somebody/large, which is neither \(.* `hf download somebody/large`"
    with pytest.raises(OSError, match=message):
        load_pair("somebody/large", random_pair_folders[1])
    with pytest.raises(OSError, match=r"^path: .* `hf download somebody/large`"):
        Processor.from_pretrained("somebody/large")
    (hub / "model.safetensors").unlink()  # as where only the configuration was fetched
    with pytest.raises(OSError, match=r"^draft: .*, got neither \(`hf download somebody/small`"):
        load_pair(random_pair_folders[0], "somebody/small")


@pytest.mark.parametrize("available", [True, False])
def test_the_default_device(available, random_pair_folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert loading.default_device() == torch.device("cuda" if available else "cpu")
    monkeypatch.setattr(loading, "default_device", lambda: torch.device("meta"))
    pair = load_pair(*random_pair_folders)
    assert pair.target.device.type == pair.draft.device.type == "meta"


def test_inputs_go_where_the_models_are(random_pair_folders, tmp_path):
    from lvspec.video import write_video

    write_video(tmp_path / "a.mp4", torch.zeros(4, 84, 84, 3, dtype=torch.uint8), fps=4)
    pair = load_pair(*random_pair_folders, device="meta")
    for processor in (pair.processor, pair.draft_processor):
        inputs = processor(tmp_path / "a.mp4", "describe the video.")
        assert {value.device.type for value in inputs.values()} == {"meta"}
        inputs = processor(tmp_path / "a.mp4", "describe the video.", device="cpu")
        assert {value.device.type for value in inputs.values()} == {"cpu"}
