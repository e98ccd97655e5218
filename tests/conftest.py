"""Fixtures that several test files use."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from lvspec.preprocess import VideoProcessorConfig
from lvspec.shapes.model_configs import draft_config, target_config
from lvspec.shapes.tokenizer import build_tokenizer


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
