"""Cheaper forms of the language model's operations, for training on a CPU.

HF's normalisation and attention go over memory in float32 many times. These compute the same, up to
bfloat16's rounding, in half the time, and are put in place for training alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

ATTENTION = "lvspec_training"


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.shape[-1] + epsilon).rsqrt()
        context.save_for_backward(x, weight, scale)
        return (x * scale.to(x.dtype)).mul_(weight)

    @staticmethod
    def backward(context, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = context.saved_tensors
        grad = grad * weight
        along = (grad * x).sum(-1, keepdim=True, dtype=torch.float32)
        along *= scale.pow(3) / x.shape[-1]
        return grad.mul_(scale.to(x.dtype)).addcmul_(x, along.to(x.dtype), value=-1), None, None


class FrozenRMSNorm(nn.Module):
    """HF's RMSNorm with a weight that is not trained."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.epsilon)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention without copies of the keys and values; arguments as HF's eager form."""
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    query = (query * scaling).reshape(batch, groups, -1, size)
    scores = query @ key.transpose(-1, -2)
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]].expand(-1, heads // groups, -1, -1)
        scores += mask.reshape(mask.shape[0], 1, -1, mask.shape[-1])
    mixed = scores.softmax(-1) @ value
    return mixed.view(batch, heads, length, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def speed_up(language: PreTrainedModel) -> None:
    """Put these in the place of HF's in a text model whose norms are frozen."""
    language.set_attn_implementation(ATTENTION)
    for layer in language.layers:
        layer.input_layernorm = FrozenRMSNorm(layer.input_layernorm)
        layer.post_attention_layernorm = FrozenRMSNorm(layer.post_attention_layernorm)
