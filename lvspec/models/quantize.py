"""Weights of a draft in fewer bytes, by torchao."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lvspec.models.byte_linear import ByteLinear
from lvspec.models.model import Model

Weights = Literal["int8", "int4", "fp8"]
WEIGHTS: tuple[Weights, ...] = ("int8", "int4", "fp8")
INT4_GROUP = 128
"""Weights of a row that share a factor."""


def quantize(model: PreTrainedModel, weights: Weights) -> PreTrainedModel:
    """Hold the weights of a draft in fewer bytes, in place; activations stay as they are.

    The linear layers of the text model, and the head: all that a draft pass reads. The vision tower
    and embeddings are left alone. Where head and embedding are one matrix, the head gets a copy of
    its own that is quantised and the embedding keeps the matrix. "int4" leaves the head alone, in
    which four bits cost more agreement than elsewhere; `DecodeConfig.draft_vocab` makes it small.

    Meant for drafts: a target that is quantised says other things. Quantise last, behind any move
    to another device. Layers that are quantised are called as they are by lvspec's pass, which on a
    CPU is then no single operation.

    Fewer bytes are less time only where a kernel reads them as they are (`byte_linear.py`): on
    CUDA int8, fp8 from compute capability 8.9 on, and int4; on a CPU int8 for bfloat16 models.
    Elsewhere, and for more rows than a draft step has, torchao expands the weights for every
    product, unless torch.compile takes both together: that saves memory and costs time.

    Args:
        model: A model of a supported family, where it will run.
        weights: "int8" or "fp8" (e4m3): a byte, and a factor a row. "int4": half a byte, and a
            factor and an offset for every 128 weights of a row; by torch's own kernel, for
            bfloat16 models on CUDA.

    Returns:
        `model`.

    Raises:
        ImportError: torchao is not installed, or lacks what this needs.
        TypeError: `model` is no HF model.
        ValueError: Other weights, a family that is not supported, a model that is quantised, or one
            for which there is no such kernel.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    text = Model(model, "model").text
    layers = {name: part for name, part in text.named_modules() if isinstance(part, nn.Linear)}
    if weights != "int4":
        layers["lm_head"] = model.lm_head
    for name, layer in layers.items():
        if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
            raise ValueError(
                f"model: expected weights that are not quantised yet, got {name} with a "
                f"{type(layer.weight).__name__} of {layer.weight.dtype}"
            )
    if weights == "int4":
        _check_int4(model, layers)
    quantize_, config = _torchao(weights)
    for layer in layers.values():
        quantize_(layer, config)
        ByteLinear.take_over(layer)
    return model


def _check_int4(model: PreTrainedModel, layers: dict[str, nn.Linear]) -> None:
    for name, layer in layers.items():
        if layer.in_features % INT4_GROUP:
            raise ValueError(
                f"weights: expected rows of a multiple of {INT4_GROUP} weights for int4, got "
                f"{layer.in_features} in {name}"
            )
    if model.device.type != "cuda" or model.dtype != torch.bfloat16:
        raise ValueError(
            f"weights: expected int8 or fp8 for a model of {model.dtype} on {model.device}, got "
            "'int4', which is for torch.bfloat16 on cuda"
        )


def _torchao(weights: Weights) -> tuple[Any, Any]:
    """Its `quantize_`, and what to call it with."""
    try:
        from torchao import quantization as torchao
        from torchao.quantization import quantize_

        if weights == "int8":
            return quantize_, torchao.Int8WeightOnlyConfig(set_inductor_config=False)
        if weights == "fp8":
            return quantize_, torchao.Float8WeightOnlyConfig(set_inductor_config=False)
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
