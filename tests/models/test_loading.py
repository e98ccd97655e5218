"""load_pair: two checkpoints that decode together, from safetensors, and no code of theirs."""

import json
import pickle
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.models.loading import check_same_tokenizer, load_pair


class _Touch:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def copied(random_pair_folders, tmp_path):
    """`copied(role)`: a copy of a checkpoint, to be spoiled."""

    def copy(role):
        source = random_pair_folders[("target", "draft").index(role)]
        return shutil.copytree(source, tmp_path / role)

    return copy


def _edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_pair_decodes_together(random_pair_folders, random_pair, make_prompt, hf_greedy):
    pair = load_pair(*random_pair_folders)
    sizes = [model.config.text_config.vocab_size for model in (pair.target, pair.draft)]
    assert sizes == [256, 224]
    assert not pair.target.training and not pair.draft.training
    assert pair.processor.video_token_id == pair.draft_processor.video_token_id == 6
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    config = DecodeConfig(max_new_tokens=12, eos_ids=())
    policy = AcceptancePolicy.strict()
    generation = generate(pair.target, pair.draft, inputs, policy=policy, config=config)
    assert generation.tokens[0].tolist() == hf_greedy(random_pair[0], inputs, 12)


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.float16])
def test_dtype(random_pair_folders, dtype):
    pair = load_pair(*random_pair_folders, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    assert {p.dtype for model in (pair.target, pair.draft) for p in model.parameters()} == {wanted}


def test_device(random_pair_folders):
    pair = load_pair(*random_pair_folders, device="meta")
    assert pair.target.device.type == pair.draft.device.type == "meta"


@pytest.mark.parametrize("role", ["target", "draft"])
def test_missing_checkpoint(random_pair_folders, tmp_path, role):
    folders = dict(zip(("target", "draft"), random_pair_folders))
    with pytest.raises(OSError, match="nowhere"):
        load_pair(**{**folders, role: tmp_path / "nowhere"})


@pytest.mark.parametrize("role", ["target", "draft"])
def test_unsupported_family(random_pair_folders, copied, role):
    folders = dict(zip(("target", "draft"), random_pair_folders))
    folders[role] = copied(role)
    _edit(folders[role] / "config.json", lambda values: values.update(model_type="video_llava"))
    message = rf"^{role}: expected a model of .*Qwen2.5-VL \(qwen2_5_vl\).*, got .* 'video_llava'$"
    with pytest.raises(ValueError, match=message):
        load_pair(**folders)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_pickled_weights_are_not_read(random_pair_folders, copied, tmp_path, role):
    folders = dict(zip(("target", "draft"), random_pair_folders))
    folders[role] = copied(role)
    (folders[role] / "model.safetensors").unlink()
    touched = tmp_path / "touched"
    (folders[role] / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Touch(touched)}))
    with pytest.raises(OSError, match="safetensors"):
        load_pair(**folders)
    assert not touched.exists()


def test_remote_code_is_not_run(random_pair_folders, copied, tmp_path):
    folder, touched = copied("target"), tmp_path / "touched"
    (folder / "remote.py").write_text(f"open({str(touched)!r}, 'w')\nclass Remote: pass\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText"), "remote.Remote")
    _edit(folder / "config.json", lambda values: values.update(auto_map=auto))
    tokenizer = {"AutoTokenizer": ["remote.Remote", "remote.Remote"]}
    _edit(folder / "tokenizer_config.json", lambda values: values.update(auto_map=tokenizer))
    pair = load_pair(folder, random_pair_folders[1])
    assert type(pair.target).__module__.startswith("transformers.")
    assert not touched.exists()


def test_tokenizers_that_differ(random_pair_folders, copied):
    folder = copied("draft")

    def rename(values):
        vocabulary = values["model"]["vocab"]
        for token in [token for token, index in vocabulary.items() if index in (20, 31)]:
            vocabulary[f"{token}s"] = vocabulary.pop(token)

    _edit(folder / "tokenizer.json", rename)
    message = r"^draft: expected the target's tokenizer, but token id 20 is '(.*)' for .* and '\1s'"
    with pytest.raises(ValueError, match=message):
        load_pair(random_pair_folders[0], folder)


@pytest.mark.parametrize("swapped", [False, True])
def test_tokenizer_with_a_token_more(random_pair_folders, swapped):
    pair = [AutoTokenizer.from_pretrained(folder) for folder in random_pair_folders]
    check_same_tokenizer(*pair)
    size = len(pair[1])
    pair[1].add_tokens(["more"])
    names = ("'more'", "None") if swapped else ("None", "'more'")
    message = f"token id {size} is {names[0]} for the target and {names[1]} for the draft"
    with pytest.raises(ValueError, match=message):
        check_same_tokenizer(*(pair[::-1] if swapped else pair))


class _Vocabulary:
    def __init__(self, **ids):
        self._ids = ids

    def get_vocab(self):
        return self._ids


def test_same_order_but_other_ids():
    with pytest.raises(ValueError, match="token id 1 is 'b' for the target and None for the draft"):
        check_same_tokenizer(_Vocabulary(a=0, b=1), _Vocabulary(a=0, b=2))
    check_same_tokenizer(_Vocabulary(a=0, b=2), _Vocabulary(b=2, a=0))
