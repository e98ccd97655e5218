"""Passes over a tree behind prompts, by lvspec's own code and by HF's forward."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.tree import ancestors_from_parents, depths

TREE = torch.tensor([-1, 0, 0, 1, 1, 2], dtype=torch.int32)


def text_of(hf):
    return hf.model.language_model


class Names(TorchDispatchMode):
    """Names of everything that is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def step(hf, prompts, fuse="kernels", *, parents=TREE, capacity=70, scores=True, tokens=None):
    """A pass over a tree behind every prompt, the cache it leaves, and what was run."""
    model = Model(hf, "target", fuse=fuse)
    prompts = prompts if isinstance(prompts, list) else [prompts]
    count, slots = len(prompts), len(parents)
    cache = model.new_cache(batch_size=count, capacity=capacity, num_slots=slots)
    for sequence, prompt in enumerate(prompts):
        model.prefill(check_inputs(model, prompt), cache, sequence)
    if tokens is None:
        tokens = torch.arange(8, 8 + count * slots).view(count, -1)
    given = tokens, depths(parents).long(), ancestors_from_parents(parents.repeat(count, 1))
    with model.active(), Names() as names:
        output = model.step(*(x.to(model.device) for x in given), cache, scores=scores)
    return output, cache, names.seen


def assert_same(ours, theirs, atol):
    output, cache, _ = ours
    wanted, other, _ = theirs
    torch.testing.assert_close(output.logits, wanted.logits, rtol=0, atol=atol)
    for name in ("masses", "peaks"):
        mine, theirs = getattr(output, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)
    for mine, theirs in zip(cache.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def check(hf, prompts, atol=2e-5, **given):
    """The step of HF's forward and lvspec's own are the same; what the latter ran."""
    ours = step(hf, prompts, **given)
    theirs = step(hf, prompts, "none", **given)
    assert_same(ours, theirs, atol)
    return ours[2]


def clip(make_prompt, seed=0, words=5, dtype=torch.float32):
    return make_prompt(words, ("video", 2, 6, 4), 3, seed=seed, dtype=dtype)
