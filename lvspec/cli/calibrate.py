"""lvspec calibrate: the fastest settings that keep a stated fidelity, as a profile."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from lvspec.cli.inputs import add_pair_options, check_inputs, load_quietly, read_samples
from lvspec.cli.options import CALL_OPTIONS, errors_by_option, options_of
from lvspec.cli.say import say
from lvspec.environment import check_json_path
from lvspec.evaluation.intervals import CONFIDENCE
from lvspec.evaluation.metrics import METRICS
from lvspec.evaluation.samples import Samples

OPTIONS = {
    **CALL_OPTIONS,
    **options_of(("draft", "videos", "fidelity", "confidence", "metric", "clips")),
    "samples": "--videos, --manifest",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `calibrate`."""
    summary = "find the fastest settings that keep a stated fidelity on your own clips"
    parser = subparsers.add_parser("calibrate", help=summary, description=summary)
    parser.set_defaults(func=run)
    add = parser.add_argument
    clips = parser.add_mutually_exclusive_group(required=True)
    clips.add_argument("--videos", metavar="FOLDER", help="a folder of videos, with --prompt")
    clips.add_argument(
        "--manifest", metavar="FILE", help="a manifest.jsonl: video, prompt, and what is known"
    )
    add("--prompt", metavar="TEXT", help="what is asked of every video of --videos")
    add("--clips", type=int, metavar="N", help="use so many of them at most")
    add(
        "--fidelity",
        type=float,
        default=0.998,
        metavar="X",
        help="share of the target's own that is to be kept (default %(default)s)",
    )
    add(
        "--confidence",
        type=float,
        default=CONFIDENCE,
        metavar="X",
        help="with which that is known (default %(default)s)",
    )
    add(
        "--metric",
        metavar="NAME",
        help="what fidelity is measured by: anchors (default: what the video decides), "
        f"{', '.join(METRICS)}, or your own module:name (default for multiple choice: own_choice)",
    )
    add(
        "--json",
        default="profile.json",
        metavar="FILE",
        help="where the profile is written (default %(default)s)",
    )
    add(
        "--folder",
        metavar="FOLDER",
        help="where captions are kept, so that the same command goes on (default: that of --json, "
        "with .work behind it)",
    )
    add("--max-new-tokens", type=int, metavar="N", help="tokens of a caption (default 256)")
    add("--gamma", type=int, metavar="N", help="this length of chains only (default: several)")
    add("--draft-keep", type=float, metavar="X", help="share of the video that the draft keeps")
    add("--strict-words", nargs="+", default=[], metavar="WORD", help="never part of a mismatch")

    add_pair_options(parser, draft="or self")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate, print the table and write the profile.

    Returns:
        0; 1 if nothing but strict could be certified, or some samples were left out; 130 after
        Ctrl-C.

    Raises:
        OSError, ValueError: Bad input.
    """
    _check(arguments)
    with errors_by_option(OPTIONS):
        samples = read_samples(arguments)
    for problem in samples.problems:
        say(problem, kind="error")
    if len(samples.samples) < 2:
        raise ValueError(
            f"--videos, --manifest: expected at least 2 clips, got {len(samples.samples)}"
        )
    folder = Path(arguments.folder or f"{arguments.json}.work")
    with errors_by_option(OPTIONS):
        calibration = _calibrate(arguments, samples, folder)
    if calibration is None:
        say(f"interrupted; every caption is in {folder}, and the same command goes on")
        return 130
    from lvspec.cli.calibration_table import print_table

    print_table(calibration)
    calibration.profile.write(arguments.json)
    for name, why in calibration.problems.items():
        say(f"{name}: {why}", kind="error")
    if calibration.is_certified:
        say(f"the profile is in {arguments.json}")
    else:
        say(f"{calibration.reason}; the profile in {arguments.json} is strict", kind="warning")
    is_whole = calibration.is_certified and not calibration.problems and not samples.problems
    return 0 if is_whole else 1


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what needs no model to be found wrong."""
    if arguments.target is None and arguments.draft is not None:
        raise ValueError(f"--target: expected one beside --draft {arguments.draft}, got none")
    if arguments.draft == "ngram":
        raise ValueError("--draft: expected a model or self, got ngram")
    check_inputs(arguments, least_clips=2)
    for name in ("fidelity", "confidence"):
        value = getattr(arguments, name)
        if not 0 < value < 1:
            raise ValueError(f"--{name}: expected a number above 0 and below 1, got {value}")
    check_json_path(arguments.json)


def _calibrate(arguments: argparse.Namespace, samples: Samples, folder: Path) -> Any:
    """The calibration; None after Ctrl-C."""
    from lvspec.calibration.calibrate import calibrate
    from lvspec.cli.checkpoints import token_ids_of
    from lvspec.config import DecodeConfig

    given = ("max_new_tokens", "gamma", "draft_keep", "cache_dtype")
    chosen = {name: v for name in given if (v := getattr(arguments, name)) is not None}
    config = DecodeConfig(**chosen)
    try:
        models = load_quietly(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries; ours are said at the end
            return calibrate(
                models.target,
                models.draft,
                samples.samples,
                processor=models.processor,
                draft_processor=models.draft_processor,
                fidelity=arguments.fidelity,
                confidence=arguments.confidence,
                metric=arguments.metric,
                clips=arguments.clips,
                config=config,
                strict_ids=token_ids_of(arguments.strict_words, models.processor),
                num_frames=arguments.num_frames,
                fps=arguments.fps,
                folder=folder,
            )
    except KeyboardInterrupt:
        return None
