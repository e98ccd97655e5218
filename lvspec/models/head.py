"""The head of a draft: logits of the tokens that it may propose.

A small model's head is a good part of what its pass reads: 136 M of the 494 M weights of a 0.5B
model with a vocabulary of 151936. Captions use few of its rows. A head of those alone gives the
same logits for them and moves a fraction of the bytes.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lvspec.models.byte_linear import ByteLinear
from lvspec.models.float8_linear import Float8Linear

_SUBSETS: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], DraftHead]] = WeakKeyDictionary()


class DraftHead(nn.Module):
    """Makes logits of what the text model returns; a column is one of the ids.

    Args:
        head: Makes the logits.
        size: The first `size` of its columns are used.
        vocabulary: int64 `[size]`, ascending: the id of each column; None: the columns are ids.
    """

    def __init__(self, head: nn.Module, size: int, vocabulary: Tensor | None = None) -> None:
        super().__init__()
        self.head, self.size = head, size
        self.register_buffer("vocabulary", vocabulary)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `[..., size]` of the text model's output `[..., hidden]`."""
        return self.head(hidden)[..., : self.size]

    def ids(self, columns: Tensor) -> Tensor:
        """int64: the ids of columns, which are integers of any shape."""
        columns = columns.long()
        return columns if self.vocabulary is None else self.vocabulary[columns]

    def over_ids(self, logits: Tensor, count: int) -> Tensor:
        """Logits `[..., size]` as `[..., count]` where every column is its id, -inf elsewhere."""
        if self.vocabulary is None:
            return logits
        spread = logits.new_full((*logits.shape[:-1], count), -torch.inf)
        return spread.index_copy_(-1, self.vocabulary, logits)


def draft_head(head: nn.Module, size: int, ids: tuple[int, ...] | None) -> DraftHead:
    """The head of a draft that may propose these ids.

    Args:
        head: The model's own.
        size: Ids below this may be proposed.
        ids: Ascending, some of those; None: all. Their rows are copied; a copy lives as long as
            `head`, and has its present weights whenever this is called.

    Raises:
        ValueError: `head` is no plain `nn.Linear`, whose rows could be copied.
    """
    if ids is None:
        return DraftHead(head, size)
    parts = _parts(head)
    known = _SUBSETS.setdefault(head, {})
    # Whoever owns the head may change it outside of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.tensor(ids, dtype=torch.int64, device=parts["weight"].device)
        found = known.get(ids)
        if found is None or not _is_made_of(found.head, parts):
            linear = nn.Linear(head.in_features, len(ids), bias="bias" in parts, device="meta")
            linear.__class__ = Float8Linear if "scale" in parts else nn.Linear
            for name, part in parts.items():
                empty = part.new_empty((len(ids), *part.shape[1:]))
                linear.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            found = known[ids] = DraftHead(linear.eval(), len(ids), rows)
        for name, part in parts.items():
            getattr(found.head, name).copy_(_some(part, rows))
    return found


def _parts(head: nn.Module) -> dict[str, Tensor]:
    """What a row of logits is made of, by name, a row each."""
    parts = {"weight": _weight(head), "bias": head.bias}
    if type(head) is Float8Linear:
        parts["scale"] = head.scale
    return {name: part for name, part in parts.items() if part is not None}


def _is_made_of(linear: nn.Linear, parts: dict[str, Tensor]) -> bool:
    """Whether it has such parts, of other rows."""
    own = {name: _kind(part) for name, part in linear.named_parameters()}
    return own == {name: _kind(part) for name, part in parts.items()}


def _some(part: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor; those of float8 cannot be selected everywhere, bytes can."""
    if part.dtype.itemsize > 1:
        return part[rows]
    return part.view(torch.uint8)[rows].view(part.dtype)


def _weight(head: nn.Module) -> Tensor:
    """Weights `[V, hidden]`; those that torchao has quantised as they are used."""
    is_plain = type(head) in (nn.Linear, ByteLinear, Float8Linear) and not (
        head._forward_hooks or head._forward_pre_hooks
    )
    is_quantised = is_plain and hasattr(head.weight, "__tensor_flatten__")  # several tensors
    if is_quantised:
        return head.weight.dequantize()
    if is_plain and head.weight.is_floating_point():
        return head.weight
    raise ValueError(
        "draft_vocab: expected a draft whose lm_head is a torch.nn.Linear without hooks, the rows "
        f"of which can be copied, got {type(head).__name__}"
    )


def _kind(weight: Tensor) -> tuple[torch.dtype, torch.device]:
    return weight.dtype, weight.device
