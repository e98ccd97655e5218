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
    weight = _weight(head)
    known = _SUBSETS.setdefault(head, {})
    # Whoever owns the head may change it outside of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.tensor(ids, dtype=torch.int64, device=weight.device)
        found = known.get(ids)
        if found is None or _kind(found.head.weight) != _kind(weight):
            linear = nn.Linear(weight.shape[1], len(ids), bias=head.bias is not None, device="meta")
            linear.weight = _like(weight, len(ids), weight.shape[1])
            if head.bias is not None:
                linear.bias = _like(head.bias, len(ids))
            found = known[ids] = DraftHead(linear.eval(), len(ids), rows)
        found.head.weight.copy_(weight[rows])
        if head.bias is not None:
            found.head.bias.copy_(head.bias[rows])
    return found


def _weight(head: nn.Module) -> Tensor:
    """Weights `[V, hidden]`; quantised ones as they are used."""
    is_plain = type(head) in (nn.Linear, ByteLinear) and not (
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


def _like(weight: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(weight.new_empty(shape), requires_grad=False)


def _kind(weight: Tensor) -> tuple[torch.dtype, torch.device]:
    return weight.dtype, weight.device
