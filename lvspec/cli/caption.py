"""lvspec caption: videos by the thousand, and how far they are."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lvspec.checks import check_seconds
from lvspec.cli.inputs import (
    add_pair_options,
    check_least,
    check_pair_options,
    load_quietly,
    read_samples,
)
from lvspec.cli.options import CALL_OPTIONS, errors_by_option, gamma_of, options_of
from lvspec.cli.say import say
from lvspec.evaluation.samples import Sample
from lvspec.policy import PRESETS, AcceptancePolicy
from lvspec.profile import Profile

if TYPE_CHECKING:
    from lvspec.captioning.run import Captioned
    from lvspec.captioning.shards import Shard
    from lvspec.config import DecodeConfig

_SHOWN = 20
"""Lines of a manifest that are said one by one where something is wrong with them."""
OPTIONS = {
    **CALL_OPTIONS,
    **options_of(("videos", "out", "profile", "status", "batch_size", "clip_timeout", "shard")),
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `caption`."""
    summary = "caption a folder or a manifest of videos: resumable, in shards"
    parser = subparsers.add_parser("caption", help=summary, description=summary)
    parser.set_defaults(func=run)
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--videos", metavar="PATTERN", help="a folder, or a pattern such as 'clips/**/*.mp4'"
    )
    data.add_argument(
        "--manifest",
        metavar="FILE",
        help="a JSON object a line: video, and id, prompt and duration (seconds) where known",
    )
    data.add_argument("--status", metavar="FOLDER", help="how far the captions in a folder are")
    add(
        "--prompt",
        metavar="TEXT",
        help="what is asked of every video (of a manifest's lines that ask nothing themselves)",
    )
    add("--out", metavar="FOLDER", help="where rows go; the same command goes on there")
    add("--shard", metavar="I/N", help="only the Ith part of N (from 1), by ids")
    add("--retry-failed", action="store_true", help="do clips again that failed before")
    add("--parquet", action="store_true", help="a closed shard is a table too (needs pyarrow)")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="captions decoded together (default: %(default)s)",
    )
    add(
        "--decode-workers",
        type=int,
        metavar="N",
        help="processes that decode videos (default: 1; with --ray as many as there is room for)",
    )
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="with Ray's actors, of the cluster there or of one made here (needs lvspec[ray])",
    )
    add("--actors", type=int, metavar="N", help="with --ray: processes with models (default: GPUs)")
    add(
        "--clip-timeout",
        type=float,
        metavar="SECONDS",
        help="a clip whose decoding takes longer has failed (default: 600; not with --ray)",
    )
    add("--max-new-tokens", type=int, metavar="N", help="tokens at most (default 256)")
    add("--gamma", type=gamma_of, metavar="N", help="draft tokens per pass, or auto (default)")
    add("--draft-keep", type=float, metavar="X", help="share of the video that drafts keep")
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--policy", choices=PRESETS, help="(default: lvspec; strict for ngram)")
    policy.add_argument("--profile", metavar="FILE", help="as lvspec calibrate found it")
    add_pair_options(parser, draft="or self, or ngram")


def run(arguments: argparse.Namespace) -> int:
    """Caption what has no row yet, or say how far that is.

    Returns:
        0; 1 if a clip has no caption, but 0 after SIGTERM; 130 after Ctrl-C.

    Raises:
        OSError, ValueError: Bad input.
    """
    with errors_by_option(OPTIONS):
        if arguments.status is not None:
            return _print_status(arguments.status)
        shard = _check(arguments)
        policy, config = _settings(arguments)
        found = read_samples(arguments, prompt=arguments.prompt, check_files=False)
        for problem in found.problems[:_SHOWN]:
            say(problem, kind="error")
        if len(found.problems) > _SHOWN:
            say(f"and {len(found.problems) - _SHOWN} more lines", kind="error")
        if not found.samples:
            raise ValueError("samples: expected at least one that is whole, got none")
        done = _caption(arguments, found.samples, policy, config, shard)
    return done or int(bool(found.problems))


def _check(arguments: argparse.Namespace) -> Shard:
    """Refuse what needs no model to be found wrong."""
    from lvspec.captioning.shards import Shard

    check_pair_options(arguments)
    check_least(arguments, "batch_size", 1)
    check_least(arguments, "decode_workers", 1)
    if arguments.clip_timeout is not None:
        check_seconds("clip_timeout", arguments.clip_timeout)
        if arguments.ray is not None:
            raise ValueError(
                "--clip-timeout: expected none beside --ray, whose tasks have no such limit, got "
                f"{arguments.clip_timeout:g}"
            )
    check_least(arguments, "actors", 1)
    if arguments.ray is None and arguments.actors is not None:
        raise ValueError(f"--actors: expected --ray beside it, got --actors {arguments.actors}")
    if arguments.ray is not None and arguments.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda beside --ray, got {arguments.device}")
    if arguments.out is None:
        raise ValueError("--out: expected a folder, got none")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ValueError(f"--prompt: expected a text, got {arguments.prompt!r}")
    if arguments.videos is not None and arguments.prompt is None:
        raise ValueError("--prompt: expected a text beside --videos, got none")
    if arguments.parquet and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            "--parquet: expected pyarrow, which is not installed (pip install lvspec[caption])"
        )
    return Shard() if arguments.shard is None else Shard.parse(arguments.shard)


def _settings(arguments: argparse.Namespace) -> tuple[AcceptancePolicy, DecodeConfig]:
    from lvspec.config import DecodeConfig
    from lvspec.phases.defaults import usual_policy

    names = ("max_new_tokens", "gamma", "draft_keep", "cache_dtype")
    given: dict[str, Any] = {n: v for n in names if (v := getattr(arguments, n)) is not None}
    if arguments.profile is not None:
        found = Profile.read(arguments.profile)
        for name in ("gamma", "draft_keep", "cache_dtype"):
            if name in given:
                raise ValueError(
                    f"{name}: expected none beside --profile, which holds all settings of what "
                    f"was calibrated, got {given[name]}"
                )
        return AcceptancePolicy.from_dict(found.policy), DecodeConfig(**{**given, **found.config})
    if arguments.policy is None:
        return usual_policy(arguments.draft), DecodeConfig(**given)
    return AcceptancePolicy.preset(arguments.policy), DecodeConfig(**given)


def _caption(
    arguments: argparse.Namespace,
    samples: Sequence[Sample],
    policy: AcceptancePolicy,
    config: DecodeConfig,
    shard: Shard,
) -> int:
    from tqdm import tqdm

    from lvspec.captioning.loop import CaptionsStopped

    if arguments.ray is None:
        make = _with_models(arguments)
    else:
        from lvspec.cli.caption_ray import caption_with_ray

        make = partial(caption_with_ray, arguments)
    # None is tqdm's "only on a terminal".
    with _draining() as is_asked_to_stop, tqdm(desc="clips", disable=None, leave=False) as bar:
        try:
            done = make(
                *(samples, policy, config, shard),
                should_stop=is_asked_to_stop,
                on_row=lambda row: bar.update(),
            )
        except KeyboardInterrupt:
            say(f"interrupted; rows are in {arguments.out}, the same command goes on")
            return 130
        except CaptionsStopped as error:
            say(error, kind="error")
            return 1
    return _say_what_was_done(done, is_stopped=is_asked_to_stop())


def _with_models(arguments: argparse.Namespace) -> Callable[..., Captioned]:
    """Captions with models that are loaded here."""
    from lvspec.captioning.preparing import Checkpoints
    from lvspec.captioning.run import caption
    from lvspec.captioning.workers import CLIP_TIMEOUT

    models = load_quietly(arguments)
    if arguments.profile is not None:
        Profile.read(arguments.profile).check(models.target, models.draft)
    frames = {"num_frames": arguments.num_frames, "fps": arguments.fps}
    recipe = Checkpoints(tuple(map(str, models.folders)), **frames)

    def make(
        samples: Sequence[Sample],
        policy: AcceptancePolicy,
        config: DecodeConfig,
        shard: Shard,
        **said: Any,
    ) -> Captioned:
        limit = arguments.clip_timeout
        return caption(
            *(models.target, models.draft, samples),
            recipe=recipe,
            tokenizer=models.processor.tokenizer,
            policy=policy,
            config=config,
            out=arguments.out,
            shard=shard,
            batch_size=arguments.batch_size,
            workers=arguments.decode_workers or 1,
            clip_timeout=CLIP_TIMEOUT if limit is None else limit,
            retry_failed=arguments.retry_failed,
            parquet=arguments.parquet,
            **said,
        )

    return make


def _say_what_was_done(done: Captioned, *, is_stopped: bool) -> int:
    pace = done.pace
    parts = [f"{pace['captions']} captions", f"{pace['failed']} failed"]
    parts += [f"{done.skipped} were there", f"{done.left} left"]
    if pace["seconds"]:
        parts += [f"{pace['captions_per_second']:.2f} captions/s"]
        parts += [f"{pace['tokens_per_second']:.1f} tokens/s"]
        parts += [] if pace["idle"] is None else [f"idle {pace['idle']:.0%}"]
        parts.append(pace["limit"])
    if done.path is not None:
        parts.append(str(done.path))
    print(" | ".join(parts), flush=True)
    if is_stopped:
        return 0
    return int(bool(pace["failed"] or done.left))


def _print_status(folder: str) -> int:
    from lvspec.captioning.status import status

    found = status(folder)
    heading = [
        "shard",
        "done",
        "failed",
        "left",
        "captions/s",
        "tokens/s",
        "idle",
        "state",
        "limit",
    ]
    lines = [heading]
    for each in found:
        pace = each.pace
        rates = [pace.get(name) for name in ("captions_per_second", "tokens_per_second", "idle")]
        left = "?" if each.left is None else str(each.left)
        line = [f"{each.shard.index}/{each.shard.count}", str(each.done), str(each.failed), left]
        formats = ("{:.2f}", "{:.1f}", "{:.0%}")
        line += ["-" if x is None else form.format(x) for form, x in zip(formats, rates)]
        is_paced = rates[0] is not None
        lines.append([*line, each.state, pace["limit"] if is_paced else "-"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    done, failed = sum(each.done for each in found), sum(each.failed for each in found)
    left = [each.left for each in found]
    total = "?" if None in left else sum(left)
    print(f"{done} done, {failed} failed, {total} left")
    return 0


@contextmanager
def _draining() -> Iterator[Any]:
    """Within this context SIGTERM asks to stop, and a second one stops at once.

    Yields a function that says whether it was asked.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def stop(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
