"""AcceptancePolicy: what a verify pass may accept beyond the target's own choice.

A draft token that equals the target's choice is always accepted. Every other draft token is a
*mismatch*; the fields below say which mismatches are tolerated. The rule itself is
`lvspec.reference.accept`. Probabilities and regrets are those of the target, in nats where they are
logarithms. Where the target samples, its choice is the sample, and they are those of the row that
it is drawn from, at the temperature and behind logits processors. This module creates no tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from lvspec.checks import finite, integer, real, token_ids
from lvspec.profile import Profile, ProfileSource
from lvspec.rule import GATE_ROWS, MAX_MISMATCHES, Rule, as_float32, log_or_off, or_off

AUTO = "auto"
"""As an `anchor_threshold`: found in the rows of each sequence, see `lvspec.reference.gate`."""

MAX_TOP_K = 16
"""The longest list of best tokens that `logit_stats` keeps per row."""

@dataclasses.dataclass(frozen=True)
class AcceptancePolicy:
    """Which draft tokens may be accepted.

    Immutable; `dataclasses.replace` makes a changed copy, checked again. Without arguments nothing
    but exact matches is accepted. A mismatch is *loose* if no guarded token is involved, every
    limit that is set holds, and its regret is within `max_regret`, or within `anchor_regret` where
    its row is an anchor. It is a *shift* if the right token stands at most `shift_window` positions
    away and its regret is within `shift_regret`.

    Args:
        anchor_threshold: A row whose visual relevance is at least this is an anchor. "auto": found
            in each sequence's own rows (`lvspec.reference.gate`), and strict until it is found.
            -inf: every row is an anchor. +inf: no row is (no visual gate, relevance is not needed).
            With "auto" or a finite one a prompt without image or video tokens is decoded strictly:
            there is nothing by which to tell its anchors.
        anchor_regret: Largest regret in nats of what is loose at an anchor; None: nothing is.
        max_regret: Largest regret in nats (target's best logit minus the token's) elsewhere, or
            None.
        top_k: The token must be among the target's `top_k` best, 1 to 16, or None. Where the target
            samples, the sample is one of them and the others are the best of the rest.
        min_prob: Smallest target probability in (0, 1], or None.
        typical_eps: Medusa's typical acceptance `p >= min(eps, delta * exp(-entropy))`; in (0, 1],
            or None.
        typical_delta: The other number of that test, > 0; set both or neither.
        min_entropy: Entropy gate in nats: `-sum p ln p` over the row's `entropy_top` best tokens,
            with probabilities of the full softmax, must reach it. None: no gate.
        entropy_top: How many tokens the entropy gate looks at, 1 to 16.
        shift_window: How many positions a right token may be off. 0: no shifts. At an anchor a
            token that comes too early is no shift; another that comes in between is one, if the
            anchor's own word follows.
        shift_regret: Largest regret in nats of a shift, or None.
        window: This many exact tokens must follow a mismatch on the path. 0: none need follow.
        max_run: At most this many mismatches in a row, >= 1, or None.
        regret_budget: At most this much summed regret in nats for the whole sequence, or None.
        regret_rate: With a budget: nats by which it grows with every output token, >= 0.
        path_regret: Where paths of a tree compete the longest wins, and a nat of regret weighs as
            much as this many tokens, >= 0.
        random_share: In place of a visual gate this share of the rows, drawn at random, may be
            loose, in [0, 1], or None: the baseline that a gate has to beat.
        random_seed: Of that draw, 0 to 65535.
        strict_ids: Tokens of which neither the draft's nor the target's side of a mismatch may be
            one.
        eos_ids: End-of-sequence tokens. Guarded like `strict_ids`; besides, nothing follows one
            that is accepted.
        name: Name of the preset it came from, or "custom".

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value is out of range, or fields contradict each other.
    """

    anchor_threshold: float | Literal["auto"] = -math.inf
    anchor_regret: float | None = None
    max_regret: float | None = None
    top_k: int | None = None
    min_prob: float | None = None
    typical_eps: float | None = None
    typical_delta: float | None = None
    min_entropy: float | None = None
    entropy_top: int = 3
    shift_window: int = 0
    shift_regret: float | None = None
    window: int = 0
    max_run: int | None = None
    regret_budget: float | None = None
    regret_rate: float = 0.0
    path_regret: float = 1.0
    random_share: float | None = None
    random_seed: int = 0
    strict_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen
        if self.anchor_threshold != AUTO:
            put(self, "anchor_threshold", real("anchor_threshold", self.anchor_threshold))
        for field in _OPTIONAL_NUMBERS:
            value = getattr(self, field)
            if value is not None:
                put(self, field, finite(field, value))
        for field in ("regret_rate", "path_regret"):
            put(self, field, finite(field, getattr(self, field)))
        for field, least, most in _INTEGER_RANGES:
            value = getattr(self, field)
            if value is not None:
                put(self, field, integer(field, value, least, most))
            elif field not in ("top_k", "max_run"):
                raise TypeError(f"{field}: expected an integer, got None")
        put(self, "strict_ids", token_ids("strict_ids", self.strict_ids))
        put(self, "eos_ids", token_ids("eos_ids", self.eos_ids))
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name: expected a non-empty string, got {self.name!r}")
        self._check_ranges()
        self._check_contradictions()
        put(self, "_rule", self._make_rule())

    def _check_ranges(self) -> None:
        for field in _NATS:
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ValueError(f"{field}: expected a number of nats >= 0 or None, got {value}")
        for field in ("regret_rate", "path_regret"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: expected a number >= 0, got {getattr(self, field)}")
        for field in ("min_prob", "typical_eps"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{field}: expected a probability in (0, 1] or None, got {value}")
        if self.random_share is not None and not 0 <= self.random_share <= 1:
            raise ValueError(
                f"random_share: expected a share in [0, 1] or None, got {self.random_share}"
            )
        if self.typical_delta is not None and self.typical_delta <= 0:
            raise ValueError(
                f"typical_delta: expected a number > 0 or None, got {self.typical_delta}"
            )

    def _check_contradictions(self) -> None:
        if (self.typical_eps is None) != (self.typical_delta is None):
            raise ValueError(
                "typical_eps, typical_delta: expected both or neither, "
                f"got typical_eps={self.typical_eps}, typical_delta={self.typical_delta}"
            )
        if self.regret_rate and self.regret_budget is None:
            raise ValueError(
                "regret_rate: expected 0 without a regret_budget, which it adds to, "
                f"got {self.regret_rate}"
            )
        if self.random_share is not None and self.anchor_threshold != math.inf:
            raise ValueError(
                "anchor_threshold: expected inf with a random_share, which stands in place of the "
                f"visual gate, got {self.anchor_threshold}"
            )
        reachable = largest_top_entropy(self.entropy_top)
        if self.min_entropy is not None and self.min_entropy > reachable:
            raise ValueError(
                f"min_entropy: expected at most {reachable:.4f}, which is all that the "
                f"entropy_top={self.entropy_top} best tokens can reach, got {self.min_entropy}"
            )
        if self.name == "strict":
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name not in _OF_STRICT and value != field.default:
                    raise ValueError(
                        f"{field.name}: expected {field.default} in the strict preset, which "
                        f"accepts exact matches only, got {value}; give the policy another name"
                    )

    def _make_rule(self) -> Rule:
        threshold = self.anchor_threshold
        if threshold == AUTO:
            threshold = -math.inf
        elif self.random_share is not None:
            threshold = self.random_share
        return Rule(
            anchor_threshold=as_float32(threshold),
            anchor_regret=or_off(self.anchor_regret, -math.inf),
            max_regret=or_off(self.max_regret, math.inf),
            top_k=float(self.top_k or 0),
            min_log_prob=log_or_off(self.min_prob),
            typical_log_eps=log_or_off(self.typical_eps),
            typical_log_delta=log_or_off(self.typical_delta),
            min_entropy=or_off(self.min_entropy, -math.inf),
            entropy_top=float(self.entropy_top),
            shift_window=float(self.shift_window),
            shift_regret=or_off(self.shift_regret, math.inf),
            window=float(self.window),
            max_run=float(min(self.max_run or MAX_MISMATCHES, MAX_MISMATCHES)),
            regret_budget=or_off(self.regret_budget, math.inf),
            regret_rate=as_float32(self.regret_rate),
            path_regret=as_float32(self.path_regret),
            gate_rows=float(GATE_ROWS if self.anchor_threshold == AUTO else 0),
            random_share=or_off(self.random_share, -1.0),
            random_seed=float(self.random_seed),
        )

    @property
    def rule(self) -> Rule:
        """The numbers a backend takes."""
        return self._rule  # type: ignore[attr-defined]

    @property
    def is_exact(self) -> bool:
        """Whether no mismatch can ever be accepted: the output is the target's own."""
        all_anchors = self.anchor_threshold == -math.inf and self.anchor_regret is None
        return all_anchors and self.shift_window == 0

    @property
    def needs_relevance(self) -> bool:
        """Whether the visual relevance of a row can change anything."""
        return self.anchor_threshold == AUTO or math.isfinite(self.anchor_threshold)

    @property
    def is_calibrating(self) -> bool:
        """Whether the threshold is found in the rows of each sequence."""
        return self.anchor_threshold == AUTO

    @property
    def needed_top_k(self) -> int:
        """The smallest `top_k` of `logit_stats` with which this policy can be applied."""
        return max(1, self.top_k or 1, 1 if self.min_entropy is None else self.entropy_top)

    @classmethod
    def strict(cls, **overrides: Any) -> AcceptancePolicy:
        """Exact matches only: lossless, greedy or sampled. `strict_ids`, `eos_ids` may be given."""
        return cls(**{"name": "strict", **overrides})

    @classmethod
    def lvspec(cls, **overrides: Any) -> AcceptancePolicy:
        """Loose where the sequence does not look at its video, next to strict where it does.

        Idea: LVSpec, "See the Forest for the Trees" (ACL 2026, arXiv 2604.05650). The rule and its
        numbers are ours: which rows look is found in each sequence itself, so there is no threshold
        to set.
        """
        fields = {
            "anchor_threshold": AUTO,
            "anchor_regret": 0.1,
            "max_regret": 1.0,
            "top_k": 5,
            "shift_window": 2,
            "shift_regret": 1.0,
            "name": "lvspec",
        }
        return cls(**{**fields, **overrides})

    @classmethod
    def fly(cls, **overrides: Any) -> AcceptancePolicy:
        """FLy: a mismatch passes where the target is undecided and five exact tokens follow.

        FLy counts its window with the mismatch (6), we count the tokens that follow (5).
        """
        fields = {
            "anchor_threshold": math.inf,
            "min_entropy": 0.3,
            "entropy_top": 3,
            "window": 5,
            "name": "fly",
        }
        return cls(**{**fields, **overrides})

    @classmethod
    def typical(cls, **overrides: Any) -> AcceptancePolicy:
        """Medusa's typical acceptance: `p >= min(0.3, 0.09 * exp(-entropy))`."""
        fields = {
            "anchor_threshold": math.inf,
            "typical_eps": 0.3,
            "typical_delta": 0.09,
            "name": "typical",
        }
        return cls(**{**fields, **overrides})

    @classmethod
    def relaxed(cls, **overrides: Any) -> AcceptancePolicy:
        """Among the target's ten best and at most 0.6 nats below the best.

        The shape of TensorRT-LLM's relaxed acceptance (top-N within delta); its delta is a
        difference of probabilities, ours one of log-probabilities.
        """
        fields = {"anchor_threshold": math.inf, "top_k": 10, "max_regret": 0.6, "name": "relaxed"}
        return cls(**{**fields, **overrides})

    @classmethod
    def random_relaxation(
        cls, share: float = 0.75, seed: int = 0, **overrides: Any
    ) -> AcceptancePolicy:
        """A mismatch passes by chance, whatever it is: what a gate has to beat.

        The baseline of a published pilot of LVSpec's authors (arXiv 2604.05546).

        Args:
            share: Of the rows, at which any mismatch passes.
            seed: Of the draw, which depends on it and on the position of a row alone.
            overrides: Of other fields.
        """
        fields = {
            "anchor_threshold": math.inf,
            "random_share": share,
            "random_seed": seed,
            "name": "random_relaxation",
        }
        return cls(**{**fields, **overrides})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> AcceptancePolicy:
        """The preset called `name`, with `overrides` of its fields.

        Raises:
            ValueError: There is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        return getattr(cls, name)(**overrides)

    @classmethod
    def from_profile(
        cls, source: ProfileSource, target: Any = None, draft: Any = None
    ) -> AcceptancePolicy:
        """What `lvspec calibrate` found. Raises as `Profile.read` and, given models, `check`."""
        found = Profile.read(source)
        if target is not None or draft is not None:
            found.check(target, draft)
        return cls.from_dict(found.policy)

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold: infinities as "inf" and "-inf", ids as lists."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _to_json(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AcceptancePolicy:
        """The inverse of `to_dict`; fields that are left out take their defaults.

        Raises:
            ValueError: A key is not a field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(
                f"values: expected keys among {', '.join(names)}, got {', '.join(unknown)}"
            )
        return cls(
            **{
                name: float(value) if value in ("inf", "-inf") else value
                for name, value in values.items()
            }
        )


PRESETS = ("strict", "lvspec", "fly", "typical", "relaxed", "random_relaxation")
"""Names of the presets, as `AcceptancePolicy.preset` takes them."""

_NATS = ("anchor_regret", "max_regret", "shift_regret", "regret_budget", "min_entropy")

_OPTIONAL_NUMBERS = (
    *_NATS,
    "min_prob",
    "typical_eps",
    "typical_delta",
    "random_share",
)

_OF_STRICT = ("strict_ids", "eos_ids", "name", "path_regret")
"""Fields that change nothing of what strict() is."""

_INTEGER_RANGES = (
    ("top_k", 1, MAX_TOP_K),
    ("entropy_top", 1, MAX_TOP_K),
    ("shift_window", 0, MAX_MISMATCHES),
    ("window", 0, MAX_MISMATCHES),
    ("max_run", 1, None),
    ("random_seed", 0, 65535),
)


def largest_top_entropy(count: int) -> float:
    """The largest `-sum p ln p`, in nats, over `count` of the entries of a distribution.

    One entry contributes most at p = 1/e, so up to two entries can all stand there; from three on
    they share the whole mass evenly.
    """
    return count / math.e if count < math.e else math.log(count)


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return list(value) if isinstance(value, tuple) else value
