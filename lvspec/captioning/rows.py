"""One caption as a line of JSON, and what all lines of a folder depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lvspec.config import DecodeConfig
from lvspec.engine.result import Generation
from lvspec.environment import plain
from lvspec.evaluation.samples import Sample
from lvspec.evaluation.ways import Way
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy
from lvspec.profile import identity

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What captions depend on besides video and prompt.

    Attributes:
        values: Plain values.
        digest: Of these; in every row.
    """

    values: Mapping[str, Any]
    digest: str

    @classmethod
    def of(
        cls,
        target: PreTrainedModel,
        draft: DraftChoice,
        policy: AcceptancePolicy,
        config: DecodeConfig,
        frames: Mapping[str, Any],
    ) -> Settings:
        """Those of a run."""
        values = plain(
            {
                "target": identity(target),
                "draft": identity(draft),
                **Way(policy, config).to_dict(),
                "frames": dict(frames),
                "dtype": str(target.dtype).removeprefix("torch."),
            }
        )
        text = json.dumps(values, sort_keys=True)
        return cls(values, hashlib.sha256(text.encode()).hexdigest()[:12])


def caption_row(
    sample: Sample, generation: Generation, seconds: float, warnings: Sequence[str], settings: str
) -> Row:
    """The row of a caption, but for its text, which is `None` until somebody has the time.

    Returns:
        `id`, `video`, `prompt`, `caption`, `tokens`, `tau` and `regret` (see `DecodeStats`),
        `seconds` from when its prompt was read to its end, beside others; `warnings` about the
        video, `error`, and the digest of the settings.
    """
    stats = generation.stats
    return {
        **_head(sample),
        "tokens": generation.tokens[0].tolist(),
        "tau": stats.tau if stats.num_accepted else None,
        "regret": stats.regret,
        "seconds": round(seconds, 4),
        "warnings": list(warnings),
        "error": None,
        "settings": settings,
    }


def error_row(sample: Sample, error: str, settings: str) -> Row:
    """The row of a clip that has no caption, with the same keys."""
    nothing = dict.fromkeys(("tokens", "tau", "regret", "seconds"))
    return {**_head(sample), **nothing, "warnings": [], "error": error, "settings": settings}


def _head(sample: Sample) -> Row:
    return {"id": sample.id, "video": sample.video, "prompt": sample.prompt, "caption": None}
