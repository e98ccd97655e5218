"""The methods by name: who decides on drafts, how they are made, and what each needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import Method, Models, huggingface_method, lvspec_method
from lvspec.policy import AcceptancePolicy

AUTOREGRESSION = "autoregression"
HF, HF_ASSISTED = "hf-generate", "hf-assisted"


@dataclass(frozen=True)
class Way:
    """How one method captions.

    Attributes:
        policy: What may be accepted; None: nothing is drafted.
        config: How drafts are made.
        is_hf: Whether HF's own `generate` captions, and of these fields only `max_new_tokens` is
            read.
        is_assisted: Whether the draft assists HF's.
    """

    policy: AcceptancePolicy | None
    config: DecodeConfig
    is_hf: bool = False
    is_assisted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain values; what is a function by its name."""
        if self.is_hf:
            facts = {"is_hf": True, "is_assisted": self.is_assisted}
            return facts | {"max_new_tokens": self.config.max_new_tokens}
        config = {name: _named(value) for name, value in asdict(self.config).items()}
        return {
            "policy": None if self.policy is None else self.policy.to_dict(),
            "config": config,
        }

    def method(self, models: Models) -> Method:
        """The method, made for these models."""
        if self.is_hf:
            return huggingface_method(
                models,
                max_new_tokens=self.config.max_new_tokens,
                assisted=self.is_assisted,
                cache="static" if self.is_assisted else "dynamic",
            )
        return lvspec_method(models, self.policy, self.config)

    def obstacle(self, models: Models, *, same_inputs: bool) -> str | None:
        """Why these models cannot caption so, or None.

        Args:
            models: Who is to.
            same_inputs: Whether target and draft take the same inputs.
        """
        drafts = self.is_assisted or self.policy is not None
        if drafts and models.draft is None:
            return "needs a draft"
        has_model = isinstance(models.draft, PreTrainedModel)
        if self.is_assisted and not has_model:
            return "needs a draft model"
        if self.is_assisted and not same_inputs:
            return "needs a draft that takes the target's inputs"
        needs_cache = self.config.tree is not None or self.config.draft_keep != 1
        if drafts and needs_cache and not (has_model or models.draft == "self"):
            return "needs a draft model"
        return None


def ways(
    names: Iterable[str] | None = None,
    *,
    config: DecodeConfig | None = None,
    lvspec: Way | None = None,
) -> dict[str, Way]:
    """The methods with these names; None: all that stand in `NAMES`.

    Args:
        names: Names of `NAMES`, or of a policy: `typical` or `relaxed`.
        config: How drafts are made, of all methods but `specvlm`, which has its own tree and share
            of the video.
        lvspec: What `lvspec` stands for; None: `AcceptancePolicy.lvspec()`, drafted so.

    Raises:
        ValueError: There is no method of a name, or a name comes twice; or `config` samples.
    """
    config = DecodeConfig() if config is None else config
    if config.samples:
        raise ValueError(
            f"config: expected temperature=0, because methods are compared by what they say, got "
            f"{config.temperature}"
        )
    known = _known(config) | ({} if lvspec is None else {"lvspec": lvspec})
    names = list(NAMES if names is None else names)
    for name in names:
        if name not in known:
            raise ValueError(f"methods: expected some of {', '.join(known)}, got {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"methods: expected each once, got {name} {names.count(name)} times")
    if not names:
        raise ValueError("methods: expected at least one, got none")
    return {name: known[name] for name in names}


NAMES = (AUTOREGRESSION, HF, HF_ASSISTED, "strict", "specvlm", "fly", "random", "lvspec")
"""The methods that stand side by side if nothing else is said."""


def _known(config: DecodeConfig) -> dict[str, Way]:
    strict = AcceptancePolicy.strict()
    return {
        AUTOREGRESSION: Way(None, config),
        HF: Way(None, config, is_hf=True),
        HF_ASSISTED: Way(None, config, is_hf=True, is_assisted=True),
        "strict": Way(strict, config),
        "specvlm": Way(strict, replace(config, tree="specvlm", draft_keep=0.1)),
        "fly": Way(AcceptancePolicy.fly(), config),
        "random": Way(AcceptancePolicy.random_relaxation(), config),
        "typical": Way(AcceptancePolicy.typical(), config),
        "relaxed": Way(AcceptancePolicy.relaxed(), config),
        "lvspec": Way(AcceptancePolicy.lvspec(), config),
    }


def _named(value: Any) -> Any:
    return f"{value.__module__}:{value.__qualname__}" if callable(value) else value
