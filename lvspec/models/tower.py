"""One vision tower in two models: what the target saw of a clip is computed once.

A draft that was pruned from the target, or leaves it early, has its tower still. Both are compared
as they are now, configuration and weights; where they are the same, what the target's gave is what
the draft's gives when it is called with the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lvspec.models.model import Model

_ORDINARY = frozenset({Tensor, nn.Parameter, nn.Buffer})
_OF_NO_MATTER = frozenset({"_name_or_path", "transformers_version", "architectures"})
_PLAIN = (type(None), bool, int, float, str, torch.dtype)


class Sight:
    """What was seen while both models read one prompt.

    Args:
        difference: See `SharedTower.difference`.

    Attributes:
        calls: Of the draft's tower.
        spared: Of these, those that the target's tower had answered.
    """

    def __init__(self, difference: str | None) -> None:
        self.difference = difference
        self.calls = self.spared = 0

    @property
    def description(self) -> str | None:
        """As `DecodeStats.draft_vision`."""
        if self.difference is None and self.calls == 0:
            return None
        if self.difference is None and self.calls == self.spared:
            return "the target's"
        return f"its own: {self.difference or 'it was shown something else than the target'}"


class SharedTower:
    """Whether a target and a draft have the same vision tower; then it looks once for both.

    Args:
        target: Reads prompts first.
        draft: Another model, on the same device.
    """

    def __init__(self, target: Model, draft: Model) -> None:
        self._models = target, draft
        self._state: tuple | None = None
        self._difference: str | None = None

    def difference(self) -> str | None:
        """Why the towers are not the same, in words; None: they are.

        Weights are compared in full once, and again where they are others than the last time, by
        where they are and how often they were written, and by one number of each.
        """
        first, second = (model.family.tower(model.hf) for model in self._models)
        reason = _obstacle(first) or _obstacle(second)
        if reason is not None or first is second:
            return reason
        weights = _weights(first), _weights(second)
        reason = _other_kind(first, second) or _other_shapes(*weights)
        if reason is not None:
            return reason
        state = tuple(map(_places, weights))
        if state != self._state:
            self._difference, self._state = _other_values(*weights), state
        elif self._difference is None:
            self._difference = _other_values(*map(_samples, weights))
        return self._difference

    @contextmanager
    def looking(self) -> Iterator[Sight]:
        """A context in which the target reads a prompt, and the draft behind it."""
        sight = Sight(self.difference())
        if sight.difference is not None:
            yield sight
            return
        target, draft = self._models
        seen: list[tuple[Any, Any]] = []

        def see(forward: Callable, *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            seen.append(((args, kwargs), _copied(output)))
            return output

        def see_again(forward: Callable, *args: Any, **kwargs: Any) -> Any:
            sight.calls += 1
            for given, output in seen:
                if _is_same(given, (args, kwargs)):
                    sight.spared += 1
                    return _copied(output)
            return forward(*args, **kwargs)

        try:
            target.seeing = partial(_instead, target.family.tower(target.hf), see)
            draft.seeing = partial(_instead, draft.family.tower(draft.hf), see_again)
            yield sight
        finally:
            del target.seeing, draft.seeing


@contextmanager
def _instead(tower: nn.Module, function: Callable) -> Iterator[None]:
    """Within this context a call of the tower is one of this function, which is given the tower's
    forward beside its arguments."""
    vars(tower)["forward"] = partial(function, tower.forward)
    try:
        yield
    finally:
        del vars(tower)["forward"]


def _obstacle(tower: nn.Module) -> str | None:
    """What else a call of a tower may do than compute the same from its weights."""
    for module in tower.modules():
        name, own = type(module).__name__, vars(module)
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not _is_of_hf(hook) for hook in hooks):
            return f"{name} has hooks"
        if "forward" in own or own.get("_compiled_call_impl") is not None:
            return f"{name} has another forward than its class"
        if module.training:
            return f"{name} is in training mode"
    return None


def _is_of_hf(hook: Callable) -> bool:
    """Whether transformers has put it there, to collect what is part of the output then."""
    return getattr(hook, "__module__", "").partition(".")[0] == "transformers"


def _other_kind(first: nn.Module, second: nn.Module) -> str | None:
    if type(first) is not type(second):
        return f"it is a {type(second).__name__}, the target's a {type(first).__name__}"
    configs = [tower.config for tower in (first, second)]
    facts = [{**config.to_dict(), "attention": config._attn_implementation} for config in configs]
    for name in sorted(facts[0].keys() | facts[1].keys()):
        target, draft = (each.get(name) for each in facts)
        if name not in _OF_NO_MATTER and target != draft:
            return f"its {name} is {draft}, the target's {target}"
    return None


_Weights = dict[str, Tensor]


def _weights(tower: nn.Module) -> _Weights:
    return {**dict(tower.named_parameters()), **dict(tower.named_buffers())}


def _other_shapes(first: _Weights, second: _Weights) -> str | None:
    for name in first.keys() | second.keys():
        if name not in first or name not in second:
            return f"only one of the towers has {name}"
        if not (type(first[name]) in _ORDINARY and type(second[name]) in _ORDINARY):
            return f"{name} is quantised"
        target, draft = ((x.dtype, tuple(x.shape), x.device) for x in (first[name], second[name]))
        if target != draft:
            return f"its {name} is {draft}, the target's {target}"
    return None


def _places(weights: _Weights) -> tuple:
    """Others as soon as one of these is elsewhere, or was written to."""
    return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights.values())


def _samples(weights: _Weights) -> _Weights:
    """One number of each in the middle: who writes past the count of writings writes them all."""
    numbers = [x[tuple(size // 2 for size in x.shape)] for x in weights.values() if x.numel()]
    by_dtype = {number.dtype: [] for number in numbers}
    for number in numbers:
        by_dtype[number.dtype].append(number)
    return {str(dtype): torch.stack(found) for dtype, found in by_dtype.items()}


def _other_values(first: _Weights, second: _Weights) -> str | None:
    for name, x in first.items():
        if x.data_ptr() != second[name].data_ptr() and not torch.equal(x, second[name]):
            return f"its weights are others than the target's ({name})"
    return None


def _is_same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal; where that cannot be known, they are not."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        kinds = [(x.dtype, x.shape, x.device) for x in (one, other)]
        return kinds[0] == kinds[1] and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[n], other[n]) for n in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return isinstance(one, _PLAIN) and one == other


def _copied(output: Any) -> Any:
    """The same tensors in another container: HF's models put what they make of them into it."""
    return type(output)(**output) if isinstance(output, ModelOutput) else output
