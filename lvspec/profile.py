"""Profile: the settings that calibration found for a pair of models, in a file that anyone reads.

Everything in it is a plain value; `lvspec/calibration/README.md` says what each field means.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from lvspec.environment import write_json

KIND, VERSION = "profile", 1

# What makes an architecture. Not all of a config: versions of transformers add fields to it.
_OF_ARCHITECTURE = frozenset(
    {
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "embed_dim", "depth"),
        *("num_heads", "num_experts", "num_experts_per_tok", "patch_size", "image_size"),
    }
)
_SAMPLED = 64
"""Weights of every tensor that are looked at."""
_SMALL = 1e-4
"""Below this a float16 may have lost what a bfloat16 has, so it counts as 0."""


@dataclass(frozen=True)
class Profile:
    """What calibration found for a target and a draft.

    Attributes:
        target, draft: `identity` of each.
        policy: Fields of `AcceptancePolicy`, as its `to_dict` gives them.
        config: Fields of `DecodeConfig` that the policy was calibrated with.
        fidelity: What was asked for and what is certified.
        clips: Names of the clips that were used.
        figures: What was predicted and measured.
        environment: Versions and the machine.
    """

    target: Mapping[str, Any]
    draft: Mapping[str, Any]
    policy: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    clips: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, source: ProfileSource) -> Profile:
        """A profile from a file, or from what such a file holds.

        Raises:
            OSError: There is no such file.
            ValueError: It is no profile, or of an unknown version; says which.
        """
        if isinstance(source, Profile):
            return source
        where, values = "a mapping", source
        if not isinstance(source, Mapping):
            where = os.fspath(source)
            values = _parsed(where)
        if not isinstance(values, Mapping) or values.get("lvspec") != KIND:
            found = values.get("lvspec") if isinstance(values, Mapping) else None
            raise ValueError(
                "profile: expected a file that lvspec calibrate wrote, got "
                f"{where}{f' with a {found} of lvspec' if found else ''}"
            )
        if values.get("version") != VERSION:
            raise ValueError(
                f"profile: expected version {VERSION}, the one that this lvspec reads, got "
                f"version {values.get('version')!r} in {where}"
            )
        known = {each.name for each in fields(cls)}
        missing = [name for name in ("target", "draft", "policy") if name not in values]
        if missing:
            raise ValueError(f"profile: expected {', '.join(missing)} in it, got none in {where}")
        given = {name: value for name, value in values.items() if name in known}
        return cls(**{**given, "clips": tuple(given.get("clips", ()))})

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a file."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"lvspec": KIND, "version": VERSION, **values}

    def write(self, path: str | os.PathLike) -> None:
        """Write the file; it is whole or not there.

        Raises:
            NotWritten: It cannot be written.
        """
        write_json(path, self.to_dict())

    def check(self, target: Any, draft: Any) -> None:
        """Refuse models that the profile was not made for.

        Args:
            target: A model.
            draft: A model, "self", "ngram", or None for nobody.

        Raises:
            ValueError: One is another; names it, and what differs.
        """
        pairs = ("target", self.target, target), ("draft", self.draft, draft)
        for role, expected, model in pairs:
            got = identity(model)
            for part, word in (("config_hash", "config"), ("weights_hash", "weights")):
                if expected.get(part) != got[part]:
                    _refuse(
                        role,
                        f"{expected.get('name')} ({word} {_short(expected.get(part))})",
                        f"{got['name']} ({word} {_short(got[part])})",
                    )
            if got["config_hash"] is None and expected.get("name") != got["name"]:
                _refuse(role, str(expected.get("name")), str(got["name"]))


ProfileSource = str | os.PathLike | Mapping[str, Any] | Profile
"""A file, what is in it, or what was read of it."""


def identity(model: Any) -> dict[str, str | None]:
    """What tells a model from others: `name`, `config_hash` and `weights_hash`.

    The hash of the config is of what makes the architecture, that of the weights of a few of every
    tensor as bfloat16, so a model is the same wherever it lies and in whatever dtype it is loaded.

    Args:
        model: A model of HF's; or "self", "ngram" or None, which have but a name.
    """
    if model is None or isinstance(model, str):
        return {"name": model or "none", "config_hash": None, "weights_hash": None}
    name = Path(str(model.config.name_or_path or type(model).__name__)).name
    facts = sorted(_architecture("", model.config.to_dict()))
    return {"name": name, "config_hash": _hash(json.dumps(facts)), "weights_hash": _weights(model)}


def _refuse(role: str, expected: str, got: str) -> NoReturn:
    raise ValueError(
        f"profile: expected the {role} that it was made for, {expected}, got {got}; lvspec "
        "calibrate makes one for this pair"
    )


def _parsed(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise type(error)(
            f"profile: expected a file that lvspec calibrate wrote, got {path}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"profile: expected a file that lvspec calibrate wrote, got {path}, which is no JSON: "
            f"{error}"
        ) from error


def _architecture(prefix: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _architecture(f"{prefix}{name}.", value)
        elif name in _OF_ARCHITECTURE and value is not None:
            yield f"{prefix}{name}", value


def _weights(model: Any) -> str | None:
    import torch

    digest, plain = hashlib.sha256(), (torch.Tensor, torch.nn.Parameter)
    for _, weight in sorted(model.named_parameters()):
        if weight.device.type == "meta":
            return None
        if type(weight) not in plain or not weight.is_floating_point() or not weight.numel():
            continue  # quantised: who quantises more of a model has another one
        count, last = min(_SAMPLED, weight.numel()), weight.numel() - 1
        where = [i * last // max(count - 1, 1) for i in range(count)]
        index = torch.unravel_index(torch.tensor(where, device=weight.device), weight.shape)
        some = weight.detach()[index].float().cpu().bfloat16().float()
        digest.update(some.masked_fill(some.abs() < _SMALL, 0.0).numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:8]
