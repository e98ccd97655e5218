"""What every test gets: one thread, a seed, and memory that is not zero by luck."""

import random

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from lvspec.preprocess import VideoProcessorConfig
from lvspec.shapes.model_configs import draft_config, target_config
from lvspec.shapes.tokenizer import build_tokenizer

POISON = 0x55  # large as an index, odd as a length, neither 0 nor -1


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Uninitialised tensors hold NaN or POISON: what is read before it is written shows."""

    def poisoned(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if type(tensor) is torch.Tensor and not tensor.is_meta and not tensor.is_quantized:
                with torch.no_grad():
                    tensor.fill_(torch.nan if tensor.dtype.is_floating_point else POISON)
            return tensor

        return allocated

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def _save_random(config, folder, seed):
    """A checkpoint of the embedded architecture with random weights and few layers."""
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = ["full_attention"] * 2
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough for the choice of a token to depend on the context
            torch.nn.init.normal_(parameter, std=0.08)
    tokenizer = build_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    VideoProcessorConfig(min_pixels=84 * 84, max_pixels=84 * 84).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_pair_folders(tmp_path_factory):
    """(target, draft): folders with random checkpoints that `from_pretrained` loads."""
    root = tmp_path_factory.mktemp("pair")
    return (
        _save_random(target_config(), root / "target", seed=0),
        _save_random(draft_config(), root / "draft", seed=1),
    )
