"""A whole pass of a float32 model on a CPU as one operation, `csrc/text_pass.h`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvspec import ops
from lvspec.models.cache import SlotCache
from lvspec.models.compact import CompactWeights
from lvspec.models.head import DraftHead
from lvspec.models.plan import DecoderPlan, LayerPlan, Product
from lvspec.ops.cpp_backend import instruction_set
from lvspec.tree import chain_ancestors

MAX_ROWS = {"avx512": 128, "avx2": 40, "portable": 4}
"""Rows up to which its products were seen to be faster than torch's, by instruction set."""

_MOST_SLOTS = 64
"""Of a pass."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As `Type` of csrc/kernels.h has them."""

Passed = tuple[Tensor, Tensor | None, Tensor | None]
"""Logits `[B, S, V]`, and with scores masses and peaks `[L, B, Hq, S]`."""


class CpuPass:
    """The passes of one model.

    Args:
        plan: Of the model; all its tensors are float32 on the CPU, and nothing is called.
        head: What makes its logits.
    """

    def __init__(self, plan: DecoderPlan, head: nn.Module) -> None:
        self._plan, self._head = plan, head
        self._compact = CompactWeights()
        self._kept: list[Tensor] = []
        self._table = torch.tensor(list(self._columns()), dtype=torch.int64)
        self._compact_head = self._compact.add(head.weight) if _is_plain(head) else None

    @property
    def num_compact(self) -> int:
        """Weights that are read from a copy of 16 bits."""
        return self._compact.count

    def is_current(self) -> bool:
        """Whether copies of weights are still what the weights are."""
        return self._compact.are_current()

    def takes(self, rows: int, head: nn.Module) -> bool:
        """Whether a pass of so many rows is faster here, and the head is one that is known."""
        return rows <= max_rows() and _is_plain(_linear(head))

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
        outputs = head.size if type(head) is DraftHead else head.weight.shape[0]
        weight = self._head_weight(head)
        given = (depths.long(), ancestors, *cache.tensors(), 0, len(self._plan.layers))
        found = torch.ops.lvspec.text_pass(
            self._table, tokens, None, *given, weight, outputs, scores
        )
        return found if scores else (found[0], None, None)

    def chain(
        self,
        tokens: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        moved: Tensor,
        cache: SlotCache,
        count: int,
        head: DraftHead,
    ) -> Tensor:
        """Passes of a greedy chain, given `takes`: ids int64 `[B, count]`.

        Args:
            tokens, depths, ancestors: Of the first pass; its last row chooses the first id.
            moved: int32 `[B]`, by which `cache.kv_len` moves on behind it. (It moves on by one
                before every other.)
            cache: The model's.
            count: Passes.
            head: Makes the logits.
        """
        given = (depths.long(), ancestors, moved, *cache.tensors(), count)
        outputs = self._head_weight(head), head.size, head.vocabulary
        return torch.ops.lvspec.text_chain(self._table, tokens, *given, *outputs)

    def read(
        self, embeds: Tensor, positions: Tensor, cache: SlotCache, sequence: int, begun: int
    ) -> Tensor:
        """Run all layers but the last over rows of a prompt.

        Args:
            embeds: `[1, T, H]`.
            positions: int64 `[R, 1, T]`.
            cache: Takes keys and values.
            sequence: Its place in there.
            begun: Rows that the place has already, behind which these are.

        Returns:
            What the last layer gets, `[T, H]`.
        """
        place = slice(sequence, sequence + 1)
        k, v, visual = cache.k[:, place], cache.v[:, place], cache.visual[place]
        known = functional.pad(positions, (begun, k.shape[3] - begun - positions.shape[2]))
        pieces = []
        for piece in embeds.split(_MOST_SLOTS, dim=1):
            count, start = piece.shape[1], begun + sum(done.shape[1] for done in pieces)
            given = (torch.arange(count), chain_ancestors(count, batch_size=1), k, v)
            given += (torch.tensor([start], dtype=torch.int32), visual, known)
            layers = (0, len(self._plan.layers) - 1)
            result, _, _ = torch.ops.lvspec.text_pass(
                self._table, None, piece, *given, *layers, None, 0, False
            )
            pieces.append(result)
        return torch.cat(pieces, dim=1)[0]

    def run_layer(
        self, index: int, hidden: Tensor, depths: Tensor, ancestors: Tensor, cache: SlotCache
    ) -> Passed:
        """What one layer makes of `hidden` `[B, S, H]`, with its masses and peaks."""
        given = (depths, ancestors, *cache.tensors(), index, 1)
        return torch.ops.lvspec.text_pass(self._table, None, hidden, *given, None, 0, True)

    def _head_weight(self, head: nn.Module) -> Tensor:
        linear = _linear(head)
        is_compact = linear is self._head and self._compact_head is not None
        return self._compact_head if is_compact else linear.weight

    def _columns(self) -> Iterator[int]:
        """The table that `csrc/binding_text.cpp` reads."""
        plan = self._plan
        first, embedding = plan.layers[0], plan.embed.weight
        yield from (embedding.shape[0], len(plan.layers), embedding.shape[1])
        yield from (first.mlp.gate.weight.shape[0], plan.text.config.num_attention_heads)
        yield _address(embedding)
        yield from (_address(plan.norm.weight), _bits(plan.norm.eps))
        yield from (_address(plan.angles.frequencies), _address(plan.angles.dimensions))
        yield _bits(plan.angles.scaling)
        for layer in plan.layers:
            yield from self._of_layer(layer)

    def _of_layer(self, layer: LayerPlan) -> Iterator[int]:
        q_norm, k_norm, head_eps = layer.head_norms
        yield from (_address(layer.input_norm.weight), _bits(layer.input_norm.eps))
        yield from self._of_projections(layer.projections)
        yield from (_address(q_norm), _address(k_norm), _bits(head_eps), _bits(layer.scaling))
        yield from self._weights(layer.out.weight)
        yield _address(layer.out.bias)
        yield from (_address(layer.post_norm.weight), _bits(layer.post_norm.eps))
        yield from self._weights(layer.mlp.gate.weight, layer.mlp.up.weight, gated=True)
        yield from self._weights(layer.mlp.down.weight)

    def _of_projections(self, parts: tuple[Product, ...]) -> Iterator[int]:
        weights = list(self._weights(*(part.weight for part in parts)))
        yield from weights
        biases = [part.bias for part in parts]
        if weights[2] == 0 and any(bias is not None for bias in biases):  # all in the first
            sizes = [part.weight.shape[0] for part in parts]
            rows = [torch.zeros(n) if x is None else x for n, x in zip(sizes, biases, strict=True)]
            biases = [self._keep(torch.cat(rows)), None, None]
        yield from map(_address, biases)

    def _weights(self, *parts: Tensor, gated: bool = False) -> Iterator[int]:
        """Address and type of each; a copy stands for all of them, in the first's place."""
        found = self._compact.add(*parts, gated=gated)
        if found is not None:
            self._keep(found)
            parts = (found, *[None] * (len(parts) - 1))
        for part in parts:
            yield from (_address(part), 0 if part is None else _TYPES[part.dtype])

    def _keep(self, x: Tensor) -> Tensor:
        self._kept.append(x)
        return x


def cpu_pass_of(plan: DecoderPlan, head: nn.Module) -> CpuPass | None:
    """The pass, where the C++ operations compute this model."""
    embedding = plan.embed
    if plan.called or type(embedding) is not nn.Embedding or not _is_own(embedding.weight):
        return None
    if ops.active_backend("cpu") != "cpp":
        return None
    mlps = [layer.mlp for layer in plan.layers]
    biases = [product.bias for mlp in mlps for product in (mlp.gate, mlp.up, mlp.down)]
    inner = {mlp.gate.weight.shape[0] for mlp in mlps}
    is_known = not any(bias is not None for bias in biases) and len(inner) == 1
    return CpuPass(plan, head) if is_known else None


@cache
def max_rows() -> int:
    """Of a pass."""
    return MAX_ROWS[instruction_set()]


def _linear(head: nn.Module) -> nn.Module:
    return head.head if type(head) is DraftHead else head


def _is_plain(head: nn.Module) -> bool:
    return type(head) is nn.Linear and head.bias is None and _is_own(head.weight)


def _is_own(weight: Tensor) -> bool:
    is_ordinary = type(weight) in (Tensor, nn.Parameter)
    is_float = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_ordinary and is_float and weight.is_contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
