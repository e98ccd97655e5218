"""caption: every sample of a shard, once; decoded ahead, decoded together, written behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lvspec.captioning.loop import Loop
from lvspec.captioning.meter import Meter
from lvspec.captioning.preparing import Recipe
from lvspec.captioning.rows import Row, Settings
from lvspec.captioning.shards import Shard, ShardFiles
from lvspec.captioning.status import Progress
from lvspec.captioning.workers import CLIP_TIMEOUT, Workers
from lvspec.captioning.writer import Writer
from lvspec.checks import check_count, check_seconds
from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.environment import made_folder
from lvspec.evaluation.samples import Problem, Sample
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy


@dataclass(frozen=True)
class Captioned:
    """What a run did.

    Attributes:
        total: Samples of the shard.
        skipped: Of these, those that had a row already.
        left: Those that have none yet.
        pace: See `lvspec.captioning.meter.Meter.to_dict`.
        path: The file of rows, if it is closed.
        problems: Lines of a manifest that are no samples.
    """

    total: int
    skipped: int
    left: int
    pace: dict[str, Any]
    path: Path | None
    problems: tuple[Problem, ...] = ()


def caption(
    target: PreTrainedModel,
    draft: DraftChoice,
    samples: Sequence[Sample],
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    policy: AcceptancePolicy,
    out: str | os.PathLike,
    config: DecodeConfig | None = None,
    shard: Shard | None = None,
    batch_size: int = 8,
    workers: int = 1,
    clip_timeout: float = CLIP_TIMEOUT,
    retry_failed: bool = False,
    parquet: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Captioned:
    """Caption samples that have no row yet: long videos first where durations are known.

    Rows are on the disk soon after a caption ends, and the same call goes on after any
    interruption. Once every sample of the shard has a row, its file is closed, see `ShardFiles`.
    Worker processes are started by `spawn`, so a script needs `if __name__ == "__main__":`.

    Args:
        target, draft, policy, config: As for `lvspec.generate`.
        samples: Of all shards; their ids differ.
        recipe: What worker processes prepare clips with: `preparing.Checkpoints` of the models'
            folders.
        tokenizer: The target's.
        out: A folder, which is made.
        shard: Which part of the samples; None: all.
        batch_size: Captions that are decoded together.
        workers: Processes that decode videos.
        clip_timeout: Seconds that a clip may take to be decoded, > 0; a process that is at it
            for longer is killed, and another takes its place.
        retry_failed: Whether clips that failed before are done again.
        parquet: Whether a closed shard is a table, too (needs pyarrow).
        should_stop: Asked again and again; True: what is under way is finished, and that is all.
        on_row: Called with every row, before it has its text.

    Raises:
        CaptionsStopped: Clip after clip failed in the same way.
        GenerationInterrupted: Ctrl-C; what was under way is lost.
        OSError, ValueError: As `ShardFiles`.
    """
    check_count("batch_size", batch_size)
    check_count("workers", workers)
    check_seconds("clip_timeout", clip_timeout)
    config = DecodeConfig() if config is None else config
    settings = Settings.of(target, draft, policy, config, recipe.frames)
    meter = Meter(batch_size)

    def make(missing: list[Sample], files: ShardFiles, progress: Progress) -> None:
        decoder = Decoder(target, draft, policy, config, batch_size=batch_size)
        with (
            Writer(files, tokenizer, room=2 * batch_size) as writer,
            Workers(recipe, workers, ahead=batch_size, timeout=clip_timeout) as processes,
        ):

            def put(row: Row) -> None:
                writer.put(row)
                progress.write_now_and_then()
                on_row(row)

            Loop(
                *(decoder, target.device, processes, settings.digest),
                *(put, meter, should_stop),
            ).run(missing)

    how = {"retry_failed": retry_failed, "parquet": parquet}
    return keep(samples, make, settings, meter, out=out, shard=shard, **how)


def keep(
    samples: Sequence[Sample],
    make: Callable[[list[Sample], ShardFiles, Progress], None],
    settings: Settings,
    meter: Meter,
    *,
    out: str | os.PathLike,
    shard: Shard | None,
    retry_failed: bool,
    parquet: bool,
) -> Captioned:
    """Rows of the samples that have none yet, in the files of a shard, whoever makes them.

    Args:
        make: Called if there are any, with them, the files that it adds rows to, and what keeps the
            pace beside them.
        settings: Of the rows.
        meter: What `make` measures its pace with.
        out, shard, retry_failed, parquet: As for `caption`.

    Raises:
        OSError, ValueError: As `ShardFiles`; and whatever `make` raises.
    """
    shard = Shard() if shard is None else shard
    folder = made_folder(out)
    mine = [sample for sample in samples if shard.has(sample)]
    with ShardFiles(folder, shard, settings) as files:
        missing = [s for s in mine if not _is_done(files, s, retry_failed)]
        missing.sort(key=lambda sample: -(sample.duration or 0.0))
        progress = Progress(folder, shard, len(mine), meter)
        if missing:
            progress.write()
            try:
                make(missing, files, progress)
            finally:
                progress.write()
        left = sum(sample.id not in files.known for sample in mine)
        if left == 0:
            files.close(parquet=parquet)
        path = files.path if files.is_closed else None
        skipped = len(mine) - len(missing)
        return Captioned(len(mine), skipped, left, meter.to_dict(), path)


def _is_done(files: ShardFiles, sample: Sample, retry_failed: bool) -> bool:
    known = files.known.get(sample.id)
    if known is None or known.prompt != sample.prompt:
        return False
    return known.error is None or not retry_failed
