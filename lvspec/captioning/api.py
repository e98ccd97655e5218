"""lvspec.caption: what `lvspec caption` does, from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from transformers import PreTrainedModel

from lvspec.captioning.preparing import Processors
from lvspec.captioning.rows import Row
from lvspec.captioning.run import Captioned
from lvspec.captioning.run import caption as run
from lvspec.captioning.shards import Shard
from lvspec.captioning.workers import CLIP_TIMEOUT
from lvspec.config import DecodeConfig
from lvspec.evaluation.samples import (
    VIDEO_SUFFIXES,
    Sample,
    Samples,
    read_manifest,
    samples_of,
    samples_of_folder,
    samples_of_pattern,
)
from lvspec.phases.defaults import usual_policy
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy
from lvspec.profile import Profile, ProfileSource
from lvspec.video.processor import HFProcessor, Processor

SampleSource = str | os.PathLike | Samples | Iterable[Sample]


def caption(
    target: PreTrainedModel,
    draft: DraftChoice,
    samples: SampleSource,
    *,
    processor: Processor | HFProcessor,
    draft_processor: Processor | HFProcessor | None = None,
    out: str | os.PathLike,
    prompt: str | None = None,
    policy: AcceptancePolicy | None = None,
    config: DecodeConfig | None = None,
    profile: ProfileSource | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    shard: Shard | str | None = None,
    batch_size: int = 8,
    decode_workers: int = 1,
    clip_timeout: float = CLIP_TIMEOUT,
    retry_failed: bool = False,
    parquet: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Captioned:
    """Caption samples that have no row in `out` yet; long videos first where durations are known.

    Videos are decoded in processes of their own, ahead of the models. Rows are on the disk soon
    after a caption ends, and the same call, or the command `lvspec caption`, goes on after any
    interruption; `lvspec/captioning/README.md` says what comes out. Processes are started by
    `spawn`, so a script needs `if __name__ == "__main__":`.

    Args:
        target, draft: As for `lvspec.generate`.
        samples: A folder of videos, a pattern such as "clips/**/*.mp4", or a manifest of JSON
            objects (any other file), see `lvspec.evaluation.samples`; or samples.
        processor: The target's.
        draft_processor: The draft's, where it prepares a video in another way.
        out: A folder, which is made; of these settings alone.
        prompt: What is asked of every video, or of those lines of a manifest that ask nothing.
        policy, config: As for `lvspec.generate`.
        profile: What `lvspec calibrate` found for this pair, in place of `policy`: drafts are made
            as it says.
        num_frames, fps: As for a processor.
        shard: Which part of the samples, such as "2/8" (by ids); None: all.
        batch_size: Captions that are decoded together.
        decode_workers: Processes that decode videos.
        clip_timeout: Seconds that a clip may take to be decoded, > 0.
        retry_failed: Whether clips that failed before are done again.
        parquet: Whether a closed shard is a table, too (needs pyarrow).
        should_stop: Asked again and again; True: what is under way is finished, and that is all.
        on_row: Called with every row, before it has its text.

    Returns:
        What was done. Clips that failed are rows with an `error`.

    Raises:
        CaptionsStopped: Ten clips in a row failed in the same way.
        GenerationInterrupted: Ctrl-C; what was under way is lost.
        OSError: Samples cannot be read, or `out` not be written.
        TypeError, ValueError: An argument is wrong; or `out` is of other settings, the first of
            which is named.
    """
    policy, config = _settings(target, draft, policy, config, profile)
    found = _found(samples, prompt)
    if not found.samples:
        raise ValueError(
            f"samples: expected at least one, got none ({len(found.problems)} with problems)"
        )
    processors = (processor,) if draft_processor is None else (processor, draft_processor)
    recipe = Processors(processors, num_frames, fps)
    try:
        ForkingPickler.dumps(recipe)
    except Exception as error:  # whatever something of a user's own makes of it
        raise TypeError(
            "processor: expected one that pickle takes, for the processes that decode, got "
            f"{type(error).__name__}: {error}"
        ) from error
    done = run(
        *(target, draft, found.samples),
        recipe=recipe,
        tokenizer=processor.tokenizer,
        policy=policy,
        config=config,
        out=out,
        shard=Shard.parse(shard) if isinstance(shard, str) else shard,
        batch_size=batch_size,
        workers=decode_workers,
        clip_timeout=clip_timeout,
        retry_failed=retry_failed,
        parquet=parquet,
        should_stop=should_stop,
        on_row=on_row,
    )
    return replace(done, problems=found.problems)


def _settings(
    target: PreTrainedModel,
    draft: DraftChoice,
    policy: AcceptancePolicy | None,
    config: DecodeConfig | None,
    profile: ProfileSource | None,
) -> tuple[AcceptancePolicy, DecodeConfig]:
    config = DecodeConfig() if config is None else config
    if profile is None:
        return (usual_policy(draft) if policy is None else policy), config
    if policy is not None:
        raise ValueError(f"policy, profile: expected one of them, got both ({policy.name})")
    known = Profile.read(profile)
    return AcceptancePolicy.from_profile(known, target, draft), replace(config, **known.config)


def _found(samples: SampleSource, prompt: str | None) -> Samples:
    """Those that are meant."""
    if not isinstance(samples, (str, os.PathLike)):
        return samples_of(samples)
    path = Path(samples)
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    if path.is_file() and not is_video:
        return read_manifest(path, prompt=prompt, check_files=False)
    if prompt is None:
        raise ValueError("prompt: expected a text beside a folder or a pattern, got none")
    return (samples_of_folder if path.is_dir() else samples_of_pattern)(os.fspath(samples), prompt)
