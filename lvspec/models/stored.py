"""Bytes that weights hold, and those of them that a pass reads."""

from __future__ import annotations

from torch import Tensor, nn


def bytes_of_pass(text: nn.Module, head: nn.Module) -> int:
    """Bytes of the weights that a pass of a text model and its head reads."""
    weights = {*text.parameters()} - {text.get_input_embeddings().weight}
    weights |= {*head.parameters()}  # may be the embeddings
    # Some that are quantised are buffers; those of one dimension are angles and ids.
    buffers = (*text.buffers(), *head.buffers())
    weights |= {buffer for buffer in buffers if buffer.dim() > 1}
    return sum(stored_bytes(weight) for weight in weights)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor holds: of a subclass made of tensors, those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
