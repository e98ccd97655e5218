"""What a text model is made of, as a decoder pass needs it: tensors by reference, and numbers.

All supported text models are the same decoder: RMSNorm, q/k/v with or without biases and head
norms, rotary embeddings, attention, gated MLP. A model of those modules has a plan, in which what
is quantised or unknown in their place is called as it is; any other has a reason why not.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from lvspec import ops

_OF_TEXT = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
_OF_A_LAYER = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_OF_ATTENTION = frozenset({*_PROJECTIONS, "o_proj", "q_norm", "k_norm"})
_OF_AN_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)


class NoPlan(Exception):
    """The text model is another kind of decoder; the message says in what."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm by its weight, or a module that is called as it is."""

    weight: Tensor | None
    eps: float
    module: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return self.module(x)
        return ops.rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class Product:
    """A linear layer by its weights, or a module that is called as it is.

    Attributes:
        weight: `[O, I]`; None where `module` is called.
        bias: `[O]` or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    module: nn.Module | None = None

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """`[R, O]`, of the normed rows `x` `[R, I]`."""
        if self.weight is not None and norm.weight is not None:
            return ops.norm_linear(x, norm.weight, norm.eps, self.weight, self.bias)
        return self(norm(x))

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return self.module(x)
        return nn.functional.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """`residual` `[R, O]` becomes the sum of it and the product of `x` `[R, I]`."""
        if self.weight is not None and self.bias is None:
            ops.linear_add_(x, self.weight, residual)
        else:
            residual += self(x)


@dataclass(frozen=True)
class GatedMlp:
    """down(silu(gate(x)) * up(x)), or a module that is called as it is.

    Attributes:
        gate, up: None where `module` is called.
        gate_up: Both, gate's rows first, where their weights stand so in memory.
    """

    gate: Product | None
    up: Product | None
    down: Product | None
    gate_up: Product | None = None
    module: nn.Module | None = None

    def add_to(self, residual: Tensor, norm: Norm) -> None:
        """`residual` `[R, H]` becomes the sum of it and the MLP of its normed rows."""
        if self.module is not None:
            residual += self.module(norm(residual))
        elif self.gate_up is not None and norm.weight is not None:
            hidden = ops.norm_gated_linear(residual, norm.weight, norm.eps, self.gate_up.weight)
            self.down.add_to(residual, hidden)
        else:
            normed = norm(residual)
            self.down.add_to(residual, ops.silu_multiply(self.gate(normed), self.up(normed)))


@dataclass(frozen=True)
class Angles:
    """Rotary cosines and sines, or a module that makes them.

    Attributes:
        frequencies: float32 `[D / 2]`.
        dimensions: int32 `[D / 2]`, which position each multiplies.
        scaling: Of cosines and sines.
        num_rows: Positions of a token, 1 or 3.
        module: HF's, for all else.
    """

    frequencies: Tensor | None
    dimensions: Tensor | None
    scaling: float
    num_rows: int
    module: nn.Module

    def __call__(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) `[B, S, D]` of positions `[R, B, S]`, in the dtype of `like`."""
        if self.dimensions is None:
            return self.of_module(positions, like)
        return ops.rotary_angles(
            positions, self.frequencies, self.dimensions, self.scaling, like.dtype
        )

    def of_module(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The same by HF's module."""
        return self.module(like, as_hf_takes_them(positions))


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer.

    Attributes:
        projections: Of queries, keys and values.
        qkv: All three as one, where their weights stand so in memory.
        q_norm, k_norm: Of heads, or None.
        scaling: Of attention.
    """

    input_norm: Norm
    projections: tuple[Product, Product, Product]
    qkv: Product | None
    q_norm: Norm | None
    k_norm: Norm | None
    out: Product
    post_norm: Norm
    mlp: GatedMlp
    scaling: float

    def project(self, rows: Tensor) -> Tensor:
        """Queries, keys and values side by side, `[R, (Hq + 2 Hkv) * D]`, of rows `[R, H]`."""
        if self.qkv is not None:
            return self.qkv.of_norm(rows, self.input_norm)
        normed = self.input_norm(rows)
        return torch.cat([projection(normed) for projection in self.projections], dim=-1)

    @property
    def head_norms(self) -> tuple[Tensor | None, Tensor | None, float]:
        """The weights of both, and the eps of them."""
        weights = [None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm)]
        return *weights, 0.0 if self.q_norm is None else self.q_norm.eps


@dataclass(frozen=True)
class DecoderPlan:
    """A text model: embedding, layers, last norm.

    Attributes:
        reference: To the model, which a plan does not keep alive.
        embed: Of token ids.
        called: Modules that are called as they are, each once.
    """

    reference: weakref.ref[nn.Module]
    embed: nn.Module
    angles: Angles
    layers: tuple[LayerPlan, ...]
    norm: Norm
    called: tuple[nn.Module, ...]

    @property
    def text(self) -> nn.Module:
        return self.reference()


class _Planner:
    """Collects the modules that have to be called on the way."""

    def __init__(self, text: nn.Module) -> None:
        self.text, self.called = text, []
        self.like = text.embed_tokens.weight

    def plan(self) -> DecoderPlan:
        text = self.text
        _expect(text, _OF_TEXT)
        layers = tuple(self.layer(layer) for layer in text.layers)
        angles = _angles(text.rotary_emb)
        if angles.dimensions is None:
            self.called.append(text.rotary_emb)
        norm, called = self.norm(text.norm), tuple(self.called)
        return DecoderPlan(weakref.ref(text), text.embed_tokens, angles, layers, norm, called)

    def layer(self, layer: nn.Module) -> LayerPlan:
        _expect(layer, _OF_A_LAYER)
        attention = layer.self_attn
        _expect(attention, _OF_ATTENTION, optional={"q_norm", "k_norm"})
        if not isinstance(getattr(attention, "scaling", None), float):
            raise NoPlan(f"{type(attention).__name__} has no scaling")
        projections = tuple(self.product(attention._modules[name]) for name in _PROJECTIONS)
        return LayerPlan(
            input_norm=self.norm(layer.input_layernorm),
            projections=projections,
            qkv=_side_by_side(projections),
            q_norm=self.head_norm(attention._modules.get("q_norm")),
            k_norm=self.head_norm(attention._modules.get("k_norm")),
            out=self.product(attention.o_proj),
            post_norm=self.norm(layer.post_attention_layernorm),
            mlp=self.mlp(layer.mlp),
            scaling=attention.scaling,
        )

    def norm(self, norm: nn.Module) -> Norm:
        eps = getattr(norm, "variance_epsilon", None)
        is_known = type(norm).__name__.endswith("RMSNorm") and isinstance(eps, float)
        if is_known and self.is_plain(norm.weight):
            return Norm(norm.weight, eps)
        self.called.append(norm)
        return Norm(None, 0.0, norm)

    def head_norm(self, norm: nn.Module | None) -> Norm | None:
        if norm is None:
            return None
        found = self.norm(norm)
        if found.weight is None:
            raise NoPlan(f"{type(norm).__name__} of heads is no RMSNorm with an ordinary weight")
        return found

    def product(self, layer: nn.Module) -> Product:
        if self.is_linear(layer):
            return Product(layer.weight, layer.bias)
        self.called.append(layer)
        return Product(None, None, layer)

    def mlp(self, mlp: nn.Module) -> GatedMlp:
        names = {name for name, module in mlp._modules.items() if module is not None}
        is_silu = isinstance(getattr(mlp, "act_fn", None), (nn.SiLU, SiLUActivation))
        if names != _OF_AN_MLP or not is_silu:
            self.called.append(mlp)
            return GatedMlp(None, None, None, module=mlp)
        gate, up, down = map(self.product, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        both = _side_by_side((gate, up))
        return GatedMlp(gate, up, down, None if both is None or both.bias is not None else both)

    def is_linear(self, layer: nn.Module) -> bool:
        bias = layer._parameters.get("bias")
        is_plain = type(layer) is nn.Linear and self.is_plain(layer.weight)
        return is_plain and (bias is None or self.is_plain(bias))

    def is_plain(self, weight: Any) -> bool:
        """Whether this is an ordinary tensor like the others."""
        return (
            type(weight) in _ORDINARY
            and weight.dtype == self.like.dtype
            and weight.device == self.like.device
            and weight.is_contiguous()
        )


def plan_of(text: nn.Module) -> DecoderPlan:
    """The plan of a text model.

    Raises:
        NoPlan: It is another kind of decoder.
    """
    if not isinstance(getattr(text, "embed_tokens", None), nn.Module):
        raise NoPlan(f"{type(text).__name__} has no embed_tokens")
    return _Planner(text).plan()


def _side_by_side(products: tuple[Product, ...]) -> Product | None:
    """One product of which these are parts, where their weights stand one below the other."""
    weights, biases = ([getattr(p, name) for p in products] for name in ("weight", "bias"))
    weight = one_below_the_other(weights) if all(w is not None for w in weights) else None
    if weight is None or all(bias is None for bias in biases):
        return None if weight is None else Product(weight, None)
    bias = one_below_the_other(biases) if all(b is not None for b in biases) else None
    return None if bias is None else Product(weight, bias)


def one_below_the_other(parts: list[Tensor]) -> Tensor | None:
    """The tensor `[sum, ...]` of which these are rows, without a copy; None where they are not."""
    first, size = parts[0], 0
    for part in parts:
        start = first.storage_offset() + size
        is_next = (
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and part.storage_offset() == start
            and part.shape[1:] == first.shape[1:]
        )
        if not is_next or not part.is_contiguous():
            return None
        size += part.numel()
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def as_hf_takes_them(positions: Tensor) -> Tensor:
    """`[3, B, T]`, or `[B, T]` where a token has one position."""
    return positions if positions.shape[0] > 1 else positions[0]


def _expect(module: nn.Module, names: frozenset[str], optional: set[str] = frozenset()) -> None:
    found = {name for name, child in module._modules.items() if child is not None}
    if not names - optional <= found <= names:
        different = ", ".join(sorted((found ^ names) - optional))
        raise NoPlan(f"{type(module).__name__} has other parts than a decoder's: {different}")


def _angles(rotary: nn.Module) -> Angles:
    """By a table, if one makes the angles that the module itself makes; else by the module."""
    frequencies = getattr(rotary, "inv_freq", None)
    scaling = getattr(rotary, "attention_scaling", None)
    kind = getattr(rotary, "rope_type", "default")
    is_fixed = isinstance(kind, str) and "dynamic" not in kind and kind != "longrope"
    is_known = isinstance(frequencies, Tensor) and isinstance(scaling, (int, float))
    sections = getattr(rotary, "mrope_section", None)
    rows = 1 if sections is None else 3
    called = Angles(None, None, 1.0, rows, rotary)
    if not (is_fixed and is_known):
        return called
    frequencies = frequencies.float()  # a model that was converted has them in its type
    half = frequencies.shape[0]
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(1000, (rows, 2, 7), generator=generator).to(frequencies.device)
    like = torch.zeros(2, 7, 1, device=frequencies.device)
    theirs = rotary(like, as_hf_takes_them(positions))
    for table in _dimension_tables(half, sections):
        dimensions = torch.tensor(table, dtype=torch.int32, device=frequencies.device)
        found = Angles(frequencies, dimensions, float(scaling), rows, rotary)
        pairs = zip(found(positions, like), theirs, strict=True)
        if all(x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in pairs):
            return found
    return called


def _dimension_tables(half: int, sections: Any) -> list[list[int]]:
    if sections is None:
        return [[0] * half]
    # One dimension behind the other, as in Qwen2-VL; or in turns, as in Qwen3-VL.
    tables = [[i % 3 for i, size in enumerate(sections) for _ in range(size)]]
    if len(sections) == 3:
        tables.append([i % 3 if i < 3 * sections[i % 3] else 0 for i in range(half)])
    return [table for table in tables if len(table) == half]
