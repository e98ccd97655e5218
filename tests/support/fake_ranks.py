"""Iterations of a target of which this process has a half, on CUDA tensors without values.

    python tests/support/fake_ranks.py GUARD WAYS TARGET DRAFT

As fake_cuda.py: what stops a device or meets another one fails. Messages are not sent, but counted.
"""

import ctypes
import json
import sys
from collections import Counter

import fake_cuda
import torch.distributed as dist
from torch import nn

from lvspec.models.ranks import Ranks, shared_by
from lvspec.models.shards import GatheredLinear, SharedEmbedding, SummedLinear

MESSAGES = Counter()


def half(model):
    """What `take_shards` leaves of it on the first of two processes."""
    ranks = Ranks(object(), fake_cuda.CUDA)
    text = model.model.language_model
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight, linear.bias = upper(linear.weight), upper(linear.bias)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = upper(linear.weight)
        attention.o_proj = SummedLinear(left(attention.o_proj.weight), None, ranks)
        mlp.down_proj = SummedLinear(left(mlp.down_proj.weight), None, ranks)
    size = len(text.embed_tokens.weight)
    text.embed_tokens = SharedEmbedding(upper(text.embed_tokens.weight), size, ranks)
    model.lm_head = GatheredLinear(text.embed_tokens.weight, size, ranks)
    shared_by(text, ranks)
    return model


def upper(weight):
    return nn.Parameter(weight.detach()[: len(weight) // 2].clone(), requires_grad=False)


def left(weight):
    return nn.Parameter(weight.detach()[:, : weight.shape[1] // 2].clone(), requires_grad=False)


def count_messages():
    """In place of NCCL: each is counted, and is of tensors of the device alone."""

    def counting(name):
        def send(*tensors, **options):
            for x in (*tensors[0], *tensors[1:]) if isinstance(tensors[0], list) else tensors:
                assert x.device.type == "cuda" and x.is_contiguous(), (name, x.device)
            MESSAGES[name] += 1

        return send

    for name in ("all_reduce", "broadcast", "all_gather"):
        setattr(dist, name, counting(name))
    dist.get_rank, dist.get_world_size = lambda group: 0, lambda group: 2


def main(names, target, draft):
    count_messages()
    build = fake_cuda.build
    fake_cuda.build = lambda folder: half(build(folder)) if folder == target else build(folder)
    fake_cuda.main(names, target, draft)
    print(json.dumps(MESSAGES))


if __name__ == "__main__":
    if sys.argv[1]:
        ctypes.CDLL(sys.argv[1])
    main(*sys.argv[2:])
