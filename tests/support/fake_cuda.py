"""Iterations on CUDA tensors without values: where a device stops, or two devices meet, it fails.

    python tests/support/fake_cuda.py GUARD WAYS TARGET DRAFT [TARGET DRAFT ...]

Fake tensors have shapes, dtypes and devices; an operation that depends on values raises. `GUARD` is
a library that makes torch builds without CUDA accept the device ("" for builds with it), WAYS are
names of `WAYS` with + between them or "all", TARGET and DRAFT folders with a config.json.
Every way runs two iterations for batches of 1 and 2: the first makes what is made once, the second
is under scrutiny.
"""

import ctypes
import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from ways import WAYS

from lvspec import AcceptancePolicy, DecodeConfig, Decoder
from lvspec.engine.roles import Roles
from lvspec.engine.sequence import Request, Sequence
from lvspec.engine.stats import DecodeStats
from lvspec.engine.stopping import Stopping
from lvspec.models import own_passes
from lvspec.tree_shapes import NAMED_TREES, StaticTree

CUDA = torch.device("cuda")


class OneDevice(TorchDispatchMode):
    """Refuses tensors of the host, but for numbers that an operation takes along."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        is_copy = "copy" in function.overloadpacket.__name__
        for x in (*args, *(kwargs or {}).values(), *results):
            if isinstance(x, torch.Tensor) and (x.dim() > 0 or is_copy):
                assert x.device.type == "cuda", f"{function}: a tensor on {x.device}"
        return result


class _Event:
    """There is no device to record one."""

    def record(self):
        return

    def synchronize(self):
        return


def set_up_tensor(data, dtype=None, device=None):
    """What `torch.tensor` makes, without the numbers: those of fakes would be looked at."""
    rows, shape = data, []
    while isinstance(rows, (list, tuple)):
        shape.append(len(rows))
        rows = rows[0] if rows else 0
    kind = dtype or {bool: torch.bool, int: torch.int64, float: torch.float32}[type(rows)]
    return torch.zeros(shape, dtype=kind, device=device or "cpu")


def build(folder):
    """A model of this configuration on the device, its weights fakes."""
    config = AutoConfig.from_pretrained(folder)
    with CUDA:
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()


def trust_plans():
    """Whether a plan computes what HF's layers do cannot be seen without numbers."""
    own_passes.first_difference = lambda *given: None
    torch.allclose = lambda *given, **options: True


def main(names, *folders):
    trust_plans()
    torch.cuda.Event = lambda **kwargs: _Event()
    Roles._on_device = lambda self: nullcontext()
    for kind in (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d, nn.LayerNorm):
        kind.reset_parameters = lambda self: None
    PreTrainedModel.init_weights = lambda self: None
    tensor = torch.tensor
    specvlm = StaticTree.of(NAMED_TREES["specvlm"])  # worked out on the host, with its numbers
    StaticTree.of = lambda branches: specvlm
    with FakeTensorMode(), torch.inference_mode():
        for target, draft in zip(folders[::2], folders[1::2], strict=True):
            target, draft = build(target), build(draft)
            for way in WAYS if names == "all" else names.split("+"):
                for batch_size in (1, 2):
                    torch.tensor = set_up_tensor
                    engine = started(target, draft, way, batch_size)
                    with engine.attention():
                        engine.run_phases()
                        torch.tensor = tensor
                        with OneDevice():
                            if engine.drafter.finds:  # a pass over the roots alone
                                engine.drafter.only_root = True
                                engine.run_phases()
                                engine.drafter.only_root = False
                            done = engine.run_phases()
                    assert done.report.device.type == done.acceptance.path.device.type == "cuda"
                    print(f"{way}, batch {batch_size}: {tuple(done.report.shape)}", flush=True)


def started(target, draft, way, batch_size):
    """An engine with a sequence in every place, as behind a prefill."""
    kind, options = WAYS[way]
    engine = Decoder(
        target,
        draft if kind == "model" else kind,
        AcceptancePolicy.lvspec(regret_budget=3.0, strict_ids=(9,)),
        DecodeConfig(gamma=5, max_new_tokens=40, eos_ids=(3,), capture=False, **options),
        batch_size=batch_size,
    ).engine
    engine.reserve(30)
    prompt = torch.zeros(1, 30, dtype=torch.int64, device=CUDA)
    for place in range(batch_size):
        request, stats = Request({"input_ids": prompt}), DecodeStats(CUDA, 5)
        engine.places[place] = Sequence(request, place, stats, None, Stopping())
    engine._is_timed = False
    return engine


if __name__ == "__main__":
    if sys.argv[1]:
        ctypes.CDLL(sys.argv[1])
    main(*sys.argv[2:])
