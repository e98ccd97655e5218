"""What lmms-eval says to lvspec in words and numbers: arguments of the model, settings of a task.

Nothing here needs lmms-eval.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lvspec.checks import check_count, check_number
from lvspec.config import DecodeConfig
from lvspec.engine.stats import DecodeStats
from lvspec.policy import PRESETS, AcceptancePolicy
from lvspec.profile import Profile

_READ = frozenset(
    ("until", "max_new_tokens", "do_sample", "num_beams", "temperature", "top_k", "top_p")
)


@dataclass(frozen=True)
class Settings:
    """A task's `generation_kwargs`, as far as they mean something here.

    Attributes:
        until: The answer ends before the first of these.
        max_new_tokens: None: `DecodeConfig`'s.
        temperature, top_k, top_p: As of `DecodeConfig`; without a temperature the last two are
            None, whatever the task says.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> Settings:
        """The settings of one request.

        Raises:
            TypeError, ValueError: One of them cannot be met; names it and `where`.
        """
        known = {name: value for name, value in given.items() if value is not None}
        until = known.get("until", ())
        until = tuple(until) if isinstance(until, (list, tuple)) else (until,)
        for string in until:
            if not isinstance(string, str) or not string:
                raise TypeError(f"{where}: until: expected non-empty strings, got {string!r}")
        if known.get("num_beams", 1) != 1:
            raise ValueError(f"{where}: num_beams: expected 1, got {known['num_beams']}")
        temperature = known.get("temperature", 0.0) if known.get("do_sample", True) else 0.0
        sampling = {name: known.get(name) for name in ("top_k", "top_p")} if temperature else {}
        return cls(until, known.get("max_new_tokens"), temperature, **sampling)

    @staticmethod
    def unread(given: Mapping[str, Any]) -> set[str]:
        """Names of what a task sets that means nothing here."""
        return {name for name, value in given.items() if value is not None} - _READ

    def config(self, base: DecodeConfig) -> DecodeConfig:
        """`base`, changed to these settings. Raises TypeError or ValueError as `DecodeConfig`."""
        length = base.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return replace(
            base,
            max_new_tokens=length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    def cut(self, text: str) -> str:
        """The answer without what ended it."""
        for string in self.until:
            text = text.partition(string)[0]
        return text.strip()


class Tally:
    """What many generations gave together."""

    def __init__(self) -> None:
        self.tokens = 0
        self._emitted = self._iterations = self._passed = self._drafted = 0
        self._regret = 0.0

    def add(self, stats: DecodeStats, num_tokens: int) -> None:
        """Count one generation of `num_tokens`, the prefill's token included."""
        self.tokens += num_tokens
        self._emitted += stats.num_emitted
        self._iterations += stats.num_iterations
        self._passed += stats.num_passed
        self._drafted += stats.num_drafted
        self._regret += stats.regret

    @property
    def tau(self) -> float:
        """Mean output tokens per verify pass, the bonus token included; NaN without a pass."""
        return self._emitted / self._iterations if self._iterations else math.nan

    def metrics(self) -> dict[str, float]:
        """tau, the share of drafted tokens that passed, regret in nats per token: what is known."""
        shares = {
            "tau": (self._emitted, self._iterations),
            "acceptance_rate": (self._passed, self._drafted),
            "regret_per_token": (self._regret, self.tokens),
        }
        return {name: part / whole for name, (part, whole) in shares.items() if whole}


def refuse_unknown(unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise TypeError if there are arguments that `function` took up as `**unknown`; names them."""
    if unknown:
        parameters = inspect.signature(function).parameters.values()
        known = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
        raise TypeError(
            f"model_args: expected names among {', '.join(sorted(set(known) - {'self'}))}, got "
            f"{', '.join(sorted(unknown))}"
        )


def policy_of(name: str | None) -> AcceptancePolicy | None:
    """The preset of this name, or ValueError; None: left to `lvspec.generate`."""
    if name is None:
        return None
    if name not in PRESETS:
        raise ValueError(f"policy: expected one of {', '.join(PRESETS)}, got {name!r}")
    return AcceptancePolicy.preset(name)


def profile_of(path: str | None, **instead: Any) -> Profile | None:
    """The profile in a file; None where there is no path.

    Args:
        instead: Arguments that say what a profile says.

    Raises:
        OSError, ValueError: It cannot be read, see `Profile.read`; or one of `instead` is given
            too.
    """
    if path is None:
        return None
    for name, value in instead.items():
        if value is not None:
            raise ValueError(f"{name}: expected none beside profile, which says it, got {value!r}")
    return Profile.read(path)


def frames_of(num_frames: int | None, fps: float | None) -> dict[str, Any]:
    """Which frames of a video: keyword arguments for a processor.

    Raises:
        TypeError, ValueError: One is out of range, or both are given; names it.
    """
    if num_frames is not None and fps is not None:
        raise ValueError(
            f"num_frames, fps: expected one of them, got num_frames={num_frames} and fps={fps}"
        )
    if num_frames is not None:
        check_count("num_frames", num_frames, least=2)
        return {"num_frames": num_frames}
    if fps is None:
        return {}
    check_number("fps", fps)
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: expected a number > 0, got {fps}")
    return {"fps": fps}


def batch_size_of(value: int | str) -> int:
    """The batch size, which lmms-eval may give as text. Raises TypeError or ValueError."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    check_count("batch_size", number)
    return number
