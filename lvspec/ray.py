"""Captions on many machines: Ray Data feeds, restarts and retries; tasks and actors are lvspec's.

Tasks decode videos ahead, an actor for each GPU has the models. Importing this needs ray; `import
lvspec` does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError(
        f"lvspec.ray: expected ray, got: {error} (pip install 'lvspec[ray]')"
    ) from error

from lvspec.captioning.alike import ALIKE, Pattern
from lvspec.captioning.cluster import Captioner, Setup, prepare, recipe_of, settings_of
from lvspec.captioning.loop import stop_at_a_pattern
from lvspec.captioning.meter import Meter
from lvspec.captioning.preparing import Recipe
from lvspec.captioning.rows import Row, error_row
from lvspec.captioning.run import Captioned, keep
from lvspec.captioning.shards import Shard, ShardFiles
from lvspec.captioning.status import Progress
from lvspec.checks import check_count
from lvspec.config import DecodeConfig
from lvspec.evaluation.samples import Sample
from lvspec.models.quantize import Weights
from lvspec.phases.defaults import usual_policy
from lvspec.policy import AcceptancePolicy

_TRIES = 3
"""Times that a clip is tried again after the process that had it died: it may be the clip's."""
_CLIPS = 1000
"""That a process decodes before another takes its place, with whatever decoders leave behind."""


@dataclass(frozen=True)
class Actors:
    """How many processes have models, and what each takes of its machine.

    Attributes:
        count: Processes, or (least, most) of them where the cluster grows and shrinks; None: one
            for each GPU that the cluster has now, or one without any.
        num_gpus: GPUs of each; None: 1 if the cluster has any, else 0.
        num_cpus: CPUs of each.
        decode_tasks: Tasks that decode videos at a time, on a CPU each; None: as many as Ray finds
            room for.
    """

    count: int | tuple[int, int] | None = None
    num_gpus: float | None = None
    num_cpus: float = 1
    decode_tasks: int | None = None

    def found(self) -> Actors:
        """With what the cluster has in place of None."""
        gpus = ray.cluster_resources().get("GPU", 0.0)
        num_gpus = self.num_gpus
        if num_gpus is None:
            num_gpus = 1 if gpus >= 1 else 0
        count = self.count
        if count is None:
            count = max(int(gpus / num_gpus), 1) if num_gpus else 1
        return Actors(count, num_gpus, self.num_cpus, self.decode_tasks)

    @property
    def device(self) -> str:
        """Where models go, once `found`: Ray shows a process its own GPUs alone."""
        return "cuda" if self.num_gpus else "cpu"


def caption(
    dataset: ray.data.Dataset,
    *,
    target: str | os.PathLike,
    draft: str | os.PathLike,
    prompt: str | None = None,
    policy: AcceptancePolicy | None = None,
    config: DecodeConfig | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    dtype: str = "auto",
    draft_weights: Weights | None = None,
    target_weights: Weights | None = None,
    batch_size: int = 8,
    concurrency: int | tuple[int, int] | None = None,
    num_gpus: float | None = None,
    num_cpus: float = 1,
    decode_tasks: int | None = None,
) -> ray.data.Dataset:
    """Caption a dataset of videos, lazily as everything of Ray Data's.

    Args:
        dataset: With columns `id`, `video` (a path that every machine finds) and perhaps `prompt`.
        target: A checkpoint that every machine finds.
        draft: Another, "self" or "ngram".
        prompt: What is asked where a row asks nothing itself.
        policy, config: As for `lvspec.generate`.
        num_frames, fps: As for a processor.
        dtype, draft_weights, target_weights: As for `lvspec.load_pair`.
        batch_size: Captions that an actor decodes together.
        concurrency, num_gpus, num_cpus, decode_tasks: See `Actors`.

    Returns:
        A dataset of one row a clip, as `lvspec.captioning.rows.caption_row` has it. A clip that
        fails is a row with its `error`. One whose process dies is done again, up to three times,
        and is then an error of Ray's, see `max_errored_blocks` of its `DataContext`.

    Raises:
        OSError, ValueError: There is no checkpoint, or not a pair.
    """
    check_count("batch_size", batch_size)
    actors = Actors(concurrency, num_gpus, num_cpus, decode_tasks).found()
    target, draft = everywhere(target), everywhere(draft)
    setup = Setup(
        *(target, draft, actors.device, batch_size),
        policy=usual_policy(draft) if policy is None else policy,
        config=DecodeConfig() if config is None else config,
        frames={"num_frames": num_frames, "fps": fps},
        dtype=dtype,
        draft_weights=draft_weights,
        target_weights=target_weights,
    )
    recipe = recipe_of(target, draft, num_frames=num_frames, fps=fps)
    return captioned(dataset, setup, recipe, actors, prompt)


def captioned(
    dataset: ray.data.Dataset,
    setup: Setup,
    recipe: Recipe,
    actors: Actors,
    prompt: str | None = None,
) -> ray.data.Dataset:
    """As `caption`, of what is put together.

    Args:
        setup: What actors load.
        recipe: What tasks prepare clips with.
        actors: As `found` leaves them.
    """
    tasks = None
    if actors.decode_tasks is not None:
        tasks = ray.data.TaskPoolStrategy(size=actors.decode_tasks)
    # A clip a task and a call: what was prepared waits in Ray's store, which knows its limits.
    clips = dataset.repartition(target_num_rows_per_block=1).map(
        prepare,
        fn_kwargs={"recipe": recipe, "prompt": prompt},
        compute=tasks,
        num_cpus=1,
        max_calls=_CLIPS,  # also what keeps Ray from decoding within the actor
        ray_remote_args_fn=_patience_of_tasks,
    )
    least, most = actors.count if isinstance(actors.count, tuple) else (actors.count,) * 2
    pool = ray.data.ActorPoolStrategy(
        min_size=least,
        max_size=most,
        max_concurrent_calls_per_actor=setup.batch_size,
        enable_true_multi_threading=True,  # calls that wait together are decoded together
    )
    return clips.map_batches(
        Captioner,
        fn_constructor_args=(setup,),
        batch_size=1,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=actors.num_cpus,
        num_gpus=actors.num_gpus,
        ray_remote_args_fn=_patience_of_actors,
    )


def caption_to_folder(
    samples: Sequence[Sample],
    setup: Setup,
    recipe: Recipe,
    actors: Actors,
    *,
    out: str | os.PathLike,
    shard: Shard | None = None,
    retry_failed: bool = False,
    parquet: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Captioned:
    """As `lvspec.captioning.run.caption`, into files of the same kind, with Ray's actors.

    Args:
        setup, recipe, actors: As for `captioned`.
        should_stop: Asked after every row; True: what is under way is given up.

    Raises:
        CaptionsStopped: Clip after clip failed in the same way.
        OSError, ValueError: As `ShardFiles`; or the models cannot be loaded.
        RuntimeError: Ray's: more than one clip in a hundred, and ten, had a process that died
            again and again; no actor could be started.
    """
    meter = _Meter(setup.batch_size)
    take = ray.remote(settings_of).options(num_gpus=actors.num_gpus, num_cpus=actors.num_cpus)
    try:
        settings = ray.get(take.remote(setup))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error

    def make(missing: list[Sample], files: ShardFiles, progress: Progress) -> None:
        pattern = Pattern()

        def put(row: Row) -> None:
            meter.begin()
            files.add(row)
            meter.count(row)
            progress.write_now_and_then()
            on_row(row)
            stop_at_a_pattern(pattern, row)

        clips: list[dict[str, str]] = []
        by_id: dict[str, Sample] = {}
        for sample in missing:
            try:
                f"{sample.id}{sample.video}{sample.prompt}".encode()
            except UnicodeEncodeError:
                words = "name: expected UTF-8, which is all that Ray's tables hold, got other bytes"
                put(error_row(sample, words, settings.digest))
                continue
            video = os.path.abspath(sample.video)
            by_id[sample.id] = sample
            clips.append({"id": sample.id, "video": video, "prompt": sample.prompt})
        if not clips:
            return
        dataset = ray.data.from_items(clips)
        dataset.context.max_errored_blocks = max(ALIKE, len(clips) // 100)
        for row in captioned(dataset, setup, recipe, actors).iter_rows():
            sample = by_id.pop(row["id"])
            tokens = None if row["tokens"] is None else list(row["tokens"])
            put({**row, "video": sample.video, "tokens": tokens})
            if should_stop():
                return
        for sample in by_id.values():
            words = "worker: expected a process that lives, got one that died again and again"
            put(error_row(sample, words, settings.digest))

    how = {"retry_failed": retry_failed, "parquet": parquet}
    return keep(samples, make, settings, meter, out=out, shard=shard, **how)


def _patience_of_tasks() -> dict[str, int]:
    return {"max_retries": _TRIES}  # Ray Data has no end to it


def _patience_of_actors() -> dict[str, int]:
    return {"max_task_retries": _TRIES}


class _Meter(Meter):
    """Of captions alone: what the time of actors is spent with, Ray's own dashboard shows."""

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "idle": None, "empty": None, "limit": "see Ray's dashboard"}


def everywhere(checkpoint: str | os.PathLike) -> str:
    """A path that means the same in another folder; a name as it is."""
    name = os.fspath(checkpoint)
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.exists() else name
