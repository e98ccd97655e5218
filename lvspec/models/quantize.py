"""Weights of a model in fewer bytes: float8 by lvspec itself, the others by torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lvspec.models.byte_linear import ByteLinear
from lvspec.models.float8_linear import Float8Linear
from lvspec.models.model import Model
from lvspec.models.release import release

Weights = Literal["int8", "int4", "fp8"]
WEIGHTS: tuple[Weights, ...] = ("int8", "int4", "fp8")
INT4_GROUP = 128
"""Weights of a row that share a factor."""


def quantize(
    model: PreTrainedModel,
    weights: Weights,
    *,
    head: bool = True,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Hold the weights of a model in fewer bytes, in place; activations stay as they are.

    The linear layers of the text model, and the head: all that a pass reads. The vision tower and
    embeddings are left alone. Where head and embedding are one matrix, the head gets a copy of its
    own that is quantised and the embedding keeps the matrix. "int4" leaves the head alone, in which
    four bits cost more agreement than elsewhere; `DecodeConfig.draft_vocab` makes it small.

    A draft in fewer bytes proposes other tokens now and then, and the target decides as before. A
    target in fewer bytes says other things: `strict()` then gives its own greedy tokens, not those
    of the model that it was made of. Layers that are quantised are called as they are by lvspec's
    pass, which on a CPU is then no single operation.

    One layer is quantised after the other, and its weights are given up before the next: beside the
    model as it was there is never more than a matrix. With `device` each goes there meanwhile, and
    whatever is not quantised behind them, so the model as it was needs no room there. Quantise
    last, behind a conversion to another dtype.

    Fewer bytes are less time only where a kernel reads them as they are (`byte_linear.py`,
    `float8_linear.py`) and for as few rows as a pass over slots has: on CUDA int8, fp8 from compute
    capability 8.9 on, and int4; on a CPU fp8, and int8 but for float64. Elsewhere weights are
    expanded for every product: that saves memory and costs time.

    Args:
        model: A model of a supported family.
        weights: "fp8" (e4m3): a byte, and a factor a row; lvspec's own. "int8": the same by
            torchao. "int4": half a byte, and a factor and an offset for every 128 weights of a row,
            by torchao and torch's own kernel, for bfloat16 models on CUDA.
        head: Whether the head is quantised ("int4": it never is). It is where a target chooses
            between tokens that are nearly as good.
        device: Where the model goes; None: it stays.

    Returns:
        `model`.

    Raises:
        ImportError: torchao is not installed, or lacks what this needs.
        TypeError: `model` is no HF model.
        ValueError: Other weights, a family that is not supported, a model that is quantised, or one
            for which there is no such kernel; or accelerate moves its weights about.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    text = Model(model, "model").text
    layers = {name: part for name, part in text.named_modules() if isinstance(part, nn.Linear)}
    if head and weights != "int4":
        layers["lm_head"] = model.lm_head
    device = model.device if device is None else torch.device(device)
    for name, layer in layers.items():
        _check_layer(name, layer)
    if weights == "int4":
        _check_int4(model.dtype, device, layers)
    quantize_layer = Float8Linear.take_over if weights == "fp8" else _by_torchao(weights)
    release(model)  # plans of passes before hold the weights
    for layer in layers.values():
        quantize_layer(layer.to(device))
    return model.to(device)


def _check_layer(name: str, layer: nn.Linear) -> None:
    if hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"model: expected weights that stay where they are, got {name} with a hook of "
            "accelerate's (device_map)"
        )
    if type(layer.weight) is not nn.Parameter or not _is_plain(layer.weight.dtype):
        raise ValueError(
            f"model: expected weights that are not quantised yet, got {name} with a "
            f"{type(layer.weight).__name__} of {layer.weight.dtype}"
        )


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _check_int4(
    dtype: torch.dtype, device: torch.device, layers: dict[str, nn.Linear]
) -> None:
    for name, layer in layers.items():
        if layer.in_features % INT4_GROUP:
            raise ValueError(
                f"weights: expected rows of a multiple of {INT4_GROUP} weights for int4, got "
                f"{layer.in_features} in {name}"
            )
    if device.type != "cuda" or dtype != torch.bfloat16:
        raise ValueError(
            f"weights: expected int8 or fp8 for a model of {dtype} on {device}, got "
            "'int4', which is for torch.bfloat16 on cuda"
        )


def _by_torchao(weights: Weights) -> Callable[[nn.Linear], None]:
    quantize_, config = _torchao(weights)

    def quantize_layer(layer: nn.Linear) -> None:
        quantize_(layer, config)
        ByteLinear.take_over(layer)

    return quantize_layer


def _torchao(weights: Weights) -> tuple[Any, Any]:
    """Its `quantize_`, and what to call it with."""
    try:
        from torchao import quantization as torchao
        from torchao.quantization import quantize_

        if weights == "int8":
            return quantize_, torchao.Int8WeightOnlyConfig(set_inductor_config=False)
        return quantize_, torchao.Int4WeightOnlyConfig(
            group_size=INT4_GROUP,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"weights: expected torchao >= 0.18 for {weights!r} (pip install lvspec[quant]), got: "
            f"{error}"
        ) from error
