"""lvspec caption --ray: the same rows, made by Ray's actors on one machine or many."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lvspec.captioning.run import Captioned
from lvspec.captioning.shards import Shard
from lvspec.config import DecodeConfig
from lvspec.evaluation.samples import Sample
from lvspec.policy import AcceptancePolicy
from lvspec.profile import Profile
from lvspec.shapes import pair as embedded

if TYPE_CHECKING:
    from lvspec.captioning.rows import Row


def caption_with_ray(
    arguments: argparse.Namespace,
    samples: Sequence[Sample],
    policy: AcceptancePolicy,
    config: DecodeConfig,
    shard: Shard,
    should_stop: Callable[[], bool],
    on_row: Callable[[Row], None],
) -> Captioned:
    """Caption samples that have no row yet, see `lvspec.ray.caption_to_folder`.

    Raises:
        ValueError: ray is not installed, or there is no cluster at that address.
        OSError, ValueError, RuntimeError: As `caption_to_folder`.
    """
    try:
        import lvspec.ray as clusters
    except ImportError as error:
        raise ValueError(f"--ray: {error}") from error
    import ray

    if not ray.is_initialized():
        try:
            ray.init(arguments.ray or None, log_to_driver=False, logging_level="WARNING")
        except ConnectionError as error:
            raise ValueError(
                f"--ray: expected a cluster at {arguments.ray}, got: {error}"
            ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one bar already
    actors = clusters.Actors(
        arguments.actors,
        num_gpus={"cpu": 0, "cuda": 1}.get(arguments.device),
        num_cpus=arguments.threads or 1,
        decode_tasks=arguments.decode_workers,
    ).found()
    target, draft = arguments.target, arguments.draft
    if target is None:
        target, draft = embedded.TARGET, draft or embedded.DRAFT
    target, draft = clusters.everywhere(target), clusters.everywhere(draft)
    frames = {"num_frames": arguments.num_frames, "fps": arguments.fps}
    is_embedded = arguments.target is None
    setup = clusters.Setup(
        *(target, draft, actors.device, arguments.batch_size, policy, config, frames),
        dtype="float32" if is_embedded and arguments.dtype == "auto" else arguments.dtype,
        draft_weights=arguments.draft_weights,
        target_weights=arguments.target_weights,
        profile=None if arguments.profile is None else Profile.read(arguments.profile),
    )
    return clusters.caption_to_folder(
        *(samples, setup, clusters.recipe_of(target, draft, **frames), actors),
        out=arguments.out,
        shard=shard,
        retry_failed=arguments.retry_failed,
        parquet=arguments.parquet,
        should_stop=should_stop,
        on_row=on_row,
    )
