"""A whole pass of a float32 model on a CPU as one operation of `csrc/text_pass.h`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from lvspec import ops
from lvspec.models.cache import SlotCache
from lvspec.models.head import DraftHead
from lvspec.models.plan import DecoderPlan, LayerPlan, Product
from lvspec.ops.cpp_backend import instruction_set

MAX_ROWS = {"avx512": 128, "avx2": 40, "portable": 4}
"""Rows up to which csrc/linear.h was seen to be faster than torch, by instruction set."""

Passed = tuple[Tensor, Tensor | None, Tensor | None]
"""Logits `[B, S, V]`, and with scores masses and peaks `[L, B, Hq, S]`."""


class CpuPass:
    """The passes of one model.

    Args:
        plan: Of the model; all its tensors are float32 on the CPU, and nothing is called.
    """

    def __init__(self, plan: DecoderPlan) -> None:
        self._plan = plan
        self._table = torch.tensor(list(_table(plan)), dtype=torch.int64)

    def takes(self, rows: int, head: nn.Module) -> bool:
        """Whether a pass of so many rows is faster here, and the head is one that is known."""
        linear = head.head if type(head) is DraftHead else head
        is_plain = type(linear) is nn.Linear and linear.bias is None and _is_own(linear.weight)
        return rows <= max_rows() and is_plain

    def run(
        self,
        tokens: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        cache: SlotCache,
        scores: bool,
        head: nn.Module,
    ) -> Passed:
        """As `Model.step`, given `takes`."""
        linear = head.head if type(head) is DraftHead else head
        outputs = head.size if type(head) is DraftHead else linear.weight.shape[0]
        given = (depths, ancestors, *cache.tensors(), 0, len(self._plan.layers))
        found = torch.ops.lvspec.text_pass(
            self._table, tokens, None, *given, linear.weight.data_ptr(), outputs, scores
        )
        return found if scores else (found[0], None, None)

    def run_layer(
        self, index: int, hidden: Tensor, depths: Tensor, ancestors: Tensor, cache: SlotCache
    ) -> Passed:
        """What one layer makes of `hidden` `[B, S, H]`, with its masses and peaks."""
        given = (depths, ancestors, *cache.tensors(), index, 1)
        return torch.ops.lvspec.text_pass(self._table, None, hidden, *given, 0, 0, True)


def cpu_pass_of(plan: DecoderPlan) -> CpuPass | None:
    """The pass, where the C++ operations compute this model."""
    if plan.called or plan.text.device.type != "cpu" or ops.active_backend("cpu") != "cpp":
        return None
    embedding = plan.text.embed_tokens
    is_plain = type(embedding) is nn.Embedding and _is_own(embedding.weight)
    mlps = [layer.mlp for layer in plan.layers]
    biases = [product.bias for mlp in mlps for product in (mlp.gate, mlp.up, mlp.down)]
    inner = {mlp.gate.weight.shape[0] for mlp in mlps}
    is_known = is_plain and not any(bias is not None for bias in biases) and len(inner) == 1
    return CpuPass(plan) if is_known else None


@cache
def max_rows() -> int:
    """Of a product that csrc/linear.h computes."""
    return MAX_ROWS[instruction_set()]


def _is_own(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.is_contiguous() and weight.device.type == "cpu"


def _table(plan: DecoderPlan) -> Iterator[int]:
    """The columns of `csrc/binding_text.cpp`."""
    first, embedding = plan.layers[0], plan.text.embed_tokens.weight
    yield from (embedding.shape[0], len(plan.layers), embedding.shape[1])
    yield from (first.mlp.gate.weight.shape[0], plan.text.config.num_attention_heads)
    yield _address(embedding)
    yield from (_address(plan.norm.weight), _bits(plan.norm.eps))
    yield from (_address(plan.angles.frequencies), _address(plan.angles.dimensions))
    yield _bits(plan.angles.scaling)
    for layer in plan.layers:
        yield from _layer(layer)


def _layer(layer: LayerPlan) -> Iterator[int]:
    q_norm, k_norm, head_eps = layer.head_norms
    yield from (_address(layer.input_norm.weight), _bits(layer.input_norm.eps))
    yield from (_address(part.weight) for part in layer.projections)
    yield from (_address(part.bias) for part in layer.projections)
    yield from (_address(q_norm), _address(k_norm), _bits(head_eps), _bits(layer.scaling))
    yield from _of_product(layer.out)
    yield from (_address(layer.post_norm.weight), _bits(layer.post_norm.eps))
    yield from (_address(part.weight) for part in (layer.mlp.gate, layer.mlp.up, layer.mlp.down))


def _of_product(product: Product) -> tuple[int, int]:
    return _address(product.weight), _address(product.bias)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
