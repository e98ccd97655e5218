"""What lvspec made of a model, taken back."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lvspec.models.model import Model


def release(model: PreTrainedModel) -> None:
    """Give up what is kept of a model: its plan, copies of weights, weights that stand together.

    Needed by whoever wants the memory of the copies back, or parameters that have memory of their
    own (on a GPU, those of products that are computed together are views of one tensor: their
    values, names and shapes are HF's own all the same). The next call makes all of it again.

    Args:
        model: A model that was decoded with. While another thread decodes with it, this waits.

    Raises:
        RuntimeError: This thread decodes with it now, as a callback of a stream does.
        TypeError: `model` is no HF model.
        ValueError: Its family is not supported.
    """
    of_family = Model(model, "model")
    if of_family.watch.is_held:
        raise RuntimeError("model: expected one that is not being decoded with, got one that is")
    with of_family.held(), torch.inference_mode(False), torch.no_grad():
        of_family.forget()
