"""Weights of products that are computed together, one below the other in memory.

Queries, keys and values are products of the same rows, and so are gate and up. As one product each
they are one kernel that fills a GPU better. HF's parameters become views of the new tensor: they
keep their values, names and shapes, and no memory is added.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lvspec.models.plan import DecoderPlan, Product, one_below_the_other


def merge(plan: DecoderPlan) -> bool:
    """Let a model's products stand together; whether anything was moved."""
    moved = False
    for layer in plan.layers:
        groups = [layer.projections]
        if layer.mlp.module is None:
            groups.append((layer.mlp.gate, layer.mlp.up))
        for group in groups:
            moved |= _merge_group(group)
    return moved


def separate(plan: DecoderPlan) -> None:
    """Give every parameter that stands together with others memory of its own again."""
    for layer in plan.layers:
        groups = [layer.projections] if layer.qkv is not None else []
        if layer.mlp.gate_up is not None:
            groups.append((layer.mlp.gate, layer.mlp.up))
        for part in (part for group in groups for part in group):
            for parameter in (part.weight, part.bias):
                if type(parameter) is nn.Parameter:
                    parameter.data = parameter.data.clone()


def _merge_group(products: tuple[Product, ...]) -> bool:
    weights = [product.weight for product in products]
    if any(weight is None or not _is_alone(weight) for weight in weights):
        return False
    biases = [product.bias for product in products if product.bias is not None]
    if biases and (len(biases) < len(products) or not all(map(_is_alone, biases))):
        return False
    for parts in (weights, biases):
        if parts:
            _put_together(parts)
    return True


def _put_together(parts: list[Tensor]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        together = torch.cat([part.data for part in parts])
        rows = together.split([part.shape[0] for part in parts])
        for part, view in zip(parts, rows, strict=True):
            part.data = view
    assert one_below_the_other(parts) is not None


def _is_alone(weight: Tensor) -> bool:
    """Whether a parameter has memory of its own, which may be left."""
    size = weight.numel() * weight.element_size()
    is_own = weight.untyped_storage().nbytes() == size
    return type(weight) is nn.Parameter and is_own and not weight.is_inference()
