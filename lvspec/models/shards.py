"""A target that transformers has spread over processes, as plain modules with this process's part.

transformers reads its part of every weight from the checkpoint, by the `tp_plan` of the model's
class, and leaves `DTensor`s and replaced forwards, which no plan and no CUDA graph can look into.
What is left here are local weights in modules that say by their class what they do with the other
ranks. So lvspec's pass, its cache and its kernels are those of one process, with fewer heads, and
HF's own forward works as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PretrainedConfig, PreTrainedModel, __version__

from lvspec.models.families import check_family
from lvspec.models.ranks import Ranks, shared_by

_ROWS, _COLUMNS = 0, 1
_BY_ROWS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
_BY_ROWS = (*_BY_ROWS, "mlp.up_proj")
_BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")


class SummedLinear(nn.Module):
    """A linear layer of which each rank has some columns: `[..., O]` of this rank's `[..., i]`.

    Args:
        weight: `[O, i]`.
        bias: `[O]` or None; the same everywhere, and added once.
        ranks: What they give is added up.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.bias, self.ranks = weight, bias, ranks

    def forward(self, x: Tensor) -> Tensor:
        result = self.ranks.sum(nn.functional.linear(x, self.weight))
        return result if self.bias is None else result + self.bias


class GatheredLinear(nn.Module):
    """A linear layer of which each rank has some rows: all outputs `[..., O]`, on every rank.

    Args:
        weight: `[o, I]`, this rank's.
        size: O, outputs of all ranks together.
        ranks: Whose outputs stand side by side.
    """

    def __init__(self, weight: nn.Parameter, size: int, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.out_features, self.ranks = weight, size, ranks

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.gather(nn.functional.linear(x, self.weight), self.out_features)


class SharedEmbedding(nn.Module):
    """An embedding of which each rank has the rows of some ids: `[..., H]` of ids `[...]`.

    Args:
        weight: `[v, H]`, this rank's rows.
        size: Rows of all ranks together.
        ranks: In the order of their rows.
    """

    def __init__(self, weight: nn.Parameter, size: int, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.ranks = weight, ranks
        self.num_embeddings, self.first = size, ranks.number * -(-size // ranks.size)

    def forward(self, ids: Tensor) -> Tensor:
        own = ids - self.first
        is_here = (own >= 0) & (own < self.weight.shape[0])
        # A rank without rows (there are fewer ids than ranks times rows) has nothing to look up.
        rows = nn.functional.embedding(torch.where(is_here, own, 0), self._rows())
        return self.ranks.sum(rows.masked_fill(~is_here[..., None], 0))

    def _rows(self) -> Tensor:
        return self.weight if len(self.weight) else self.weight.new_zeros(1, self.weight.shape[1])


def check_can_be_spread(config: PretrainedConfig, size: int) -> None:
    """Refuse a target before its weights are read, if it cannot be spread.

    Args:
        config: Of the whole model.
        size: Processes.

    Raises:
        ValueError: `size` does not divide the heads, or transformers has no plan for its layers.
    """
    family, text = check_family(config.model_type, "target"), config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or {}
    missing = [name for name in (*_BY_ROWS, *_BY_COLUMNS) if f"layers.*.{name}" not in plan]
    if not family.has_static_pass:
        missing = ["experts that lvspec can take"]
    if missing:
        raise ValueError(
            "tensor_parallel: expected a target whose layers transformers can spread, got "
            f"{family.name}: transformers {__version__} has no tp_plan for {missing[0]} of its "
            f"text model ({text.model_type}); one process, or device_map, runs it"
        )
    for heads, kind in (
        (text.num_key_value_heads, "key and value heads"),
        (text.num_attention_heads, "attention heads"),
    ):
        if heads % size:
            raise ValueError(
                "tensor_parallel: expected a number of processes (--nproc-per-node) that divides "
                f"the target's {heads} {kind}, got {size}"
            )


def take_shards(model: PreTrainedModel, ranks: Ranks) -> None:
    """Leave this process's part of a model that transformers has spread, in plain modules.

    Args:
        model: Of `from_pretrained(distributed_config=...)`; changed in place.
        ranks: Who has the other parts.

    Raises:
        ValueError: Parts are cut otherwise than is known here; names the module.
    """
    text = check_family(model.config.model_type, "target").text_model(model)
    with torch.no_grad():
        for layer in text.layers:
            for name in _BY_ROWS:
                _keep_rows(layer.get_submodule(name), name)
            for name in _BY_COLUMNS:
                parent, _, child = name.rpartition(".")
                linear = layer.get_submodule(name)
                weight, bias = _part(linear.weight, _COLUMNS, name), _whole(linear.bias)
                setattr(layer.get_submodule(parent), child, SummedLinear(weight, bias, ranks))
        embedding, head = text.embed_tokens, model.lm_head
        is_tied = head.weight is embedding.weight
        weight = embedding.weight
        if isinstance(weight, DTensor):
            part = _part(weight, _ROWS, "embed_tokens")
            text.embed_tokens = SharedEmbedding(part, weight.shape[0], ranks)
        if isinstance(head.weight, DTensor):
            size = head.weight.shape[0]
            part = text.embed_tokens.weight if is_tied else _part(head.weight, _ROWS, "lm_head")
            if head.bias is not None:
                raise ValueError("target: expected a head without a bias, got one that is spread")
            model.lm_head = GatheredLinear(part, size, ranks)
    for module in text.modules():  # transformers replaces that of norms of heads, too
        vars(module).pop("forward", None)
    _check_nothing_is_left(model)
    model.save_pretrained = _refuse_to_save
    shared_by(text, ranks)


def _refuse_to_save(*_: object, **__: object) -> None:
    """It would be a checkpoint of one process's part, under the names of the whole."""
    raise ValueError(
        "save_pretrained: expected a whole model, got one process's part of a target that "
        "tensor_parallel=True has spread over several"
    )


def _keep_rows(linear: nn.Module, name: str) -> None:
    """Queries, keys and the like: outputs of this rank's rows, for itself."""
    linear.weight = _part(linear.weight, _ROWS, name)
    if linear.bias is not None:
        linear.bias = _part(linear.bias, _ROWS, name)
    linear.out_features = linear.weight.shape[0]


def _part(weight: Tensor, dim: int, name: str) -> nn.Parameter:
    """This rank's part of a weight that is cut along `dim`."""
    places = weight.placements if isinstance(weight, DTensor) else "a whole weight"
    if not isinstance(weight, DTensor) or list(places) not in ([Shard(dim)], [Shard(dim - 2)]):
        raise ValueError(
            f"target: expected {name} to be spread along dimension {dim}, got {places} from "
            f"transformers {__version__}"
        )
    return nn.Parameter(weight.to_local().contiguous(), requires_grad=False)


def _whole(bias: Tensor | None) -> nn.Parameter | None:
    if bias is None:
        return None
    local = bias.to_local() if isinstance(bias, DTensor) else bias.data
    return nn.Parameter(local, requires_grad=False)


def _check_nothing_is_left(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if isinstance(weight, DTensor):
            raise ValueError(
                f"target: expected layers, embeddings and head alone to be spread, got {name}, "
                f"which transformers {__version__} spreads too"
            )
