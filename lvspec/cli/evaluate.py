"""lvspec evaluate: methods side by side over a user's own videos, or a data set on disk."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from typing import Any

from lvspec.cli.inputs import add_pair_options, check_inputs, load_quietly, read_samples
from lvspec.cli.options import (
    CALL_OPTIONS,
    errors_by_option,
    gamma_of,
    options_of,
)
from lvspec.cli.say import say
from lvspec.evaluation.datasets import READERS, read_dataset
from lvspec.evaluation.judge import Judge
from lvspec.evaluation.samples import Problem, Samples

OPTIONS = {
    **CALL_OPTIONS,
    **options_of(("videos", "dataset", "methods", "metric", "confidence", "out", "profile")),
    "samples": "--manifest, --videos, --dataset",
}
KEY = "OPENAI_API_KEY"
_SHOWN = 20
"""Problems that are said one by one; all of them are in the summary."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `evaluate`."""
    summary = "caption videos by several methods side by side, and compare them"
    parser = subparsers.add_parser("evaluate", help=summary, description=summary)
    parser.set_defaults(func=run)
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--manifest", metavar="FILE", help="a manifest.jsonl: video, prompt, and what is known"
    )
    data.add_argument("--videos", metavar="FOLDER", help="a folder of videos, with --prompt")
    data.add_argument(
        "--dataset",
        nargs=2,
        metavar=("NAME", "FOLDER"),
        help=f"a data set as its authors publish it: {', '.join(READERS)}",
    )
    add("--prompt", metavar="TEXT", help="what is asked of every video of --videos")
    add("--clips", type=int, metavar="N", help="only the first N samples")
    add(
        "--out",
        default="evaluation",
        metavar="FOLDER",
        help="where captions and the summary go; the same command goes on there (default: "
        "%(default)s)",
    )
    add(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="autoregression, hf-generate, hf-assisted, strict, specvlm, fly, random, lvspec "
        "(default: all of these), typical, relaxed",
    )
    add("--profile", metavar="FILE", help="what lvspec calibrate found, for the method lvspec")
    add(
        "--metric",
        nargs="+",
        default=[],
        metavar="MODULE:NAME",
        help="your own: a function of text, sample, and what the target says by itself",
    )
    add("--confidence", type=float, metavar="X", help="of all intervals (default 0.95)")
    add("--max-new-tokens", type=int, metavar="N", help="tokens at most (default 256)")
    add("--gamma", type=gamma_of, metavar="N", help="draft tokens per pass, or auto (default)")
    add("--draft-keep", type=float, metavar="X", help="share of the video that drafts keep")
    add("--trace", action="store_true", help="keep what happened to every token (lvspec report)")

    judge = parser.add_argument_group("judge", "an endpoint with OpenAI's chat completions")
    judge.add_argument("--judge-url", metavar="URL", help="such as http://127.0.0.1:8000/v1")
    judge.add_argument("--judge-model", metavar="NAME", help="which model judges there")
    judge.add_argument(
        "--judge-key-env", metavar="NAME", help=f"variable that holds the key (default: {KEY})"
    )

    add_pair_options(parser, draft="or self, or ngram")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print the table.

    Returns:
        0; 1 if a sample, a caption or a judgement is missing; 130 after Ctrl-C.

    Raises:
        ImportError: What counts is not installed.
        OSError, ValueError: Bad input.
    """
    _check(arguments)
    judge = _judge(arguments)
    with errors_by_option(OPTIONS):
        samples = _samples(arguments)
        _say_problems(samples.problems)
        if not samples.samples:
            raise ValueError("samples: expected at least one that is whole, got none")
        return _evaluate(arguments, samples, judge)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what needs no model to be found wrong."""
    check_inputs(arguments, least_clips=1)
    if (arguments.judge_url is None) != (arguments.judge_model is None):
        names = ("--judge-url", "--judge-model")
        given, missing = names if arguments.judge_model is None else names[::-1]
        raise ValueError(f"{missing}: expected one beside {given}, got none")


def _judge(arguments: argparse.Namespace) -> Judge | None:
    if arguments.judge_url is None:
        if arguments.judge_key_env is not None:
            raise ValueError("--judge-url: expected one beside --judge-key-env, got none")
        return None
    name = arguments.judge_key_env or KEY
    key = os.environ.get(name)
    if key is None and arguments.judge_key_env is not None:
        raise ValueError(f"--judge-key-env: expected a variable that is set, got {name}")
    with errors_by_option(options_of(("judge_url", "judge_model"))):
        return Judge(arguments.judge_url, arguments.judge_model, key)


def _samples(arguments: argparse.Namespace) -> Samples:
    if arguments.dataset is not None:
        found = read_dataset(*arguments.dataset)
    else:
        found = read_samples(arguments)
    return Samples(found.samples[: arguments.clips], found.problems)


def _say_problems(problems: Sequence[Problem]) -> None:
    for problem in problems[:_SHOWN]:
        say(problem, kind="error")
    if len(problems) > _SHOWN:
        say(f"and {len(problems) - _SHOWN} more, all in the summary", kind="error")


def _evaluate(arguments: argparse.Namespace, samples: Samples, judge: Judge | None) -> int:
    from lvspec.cli.evaluation_table import print_evaluation
    from lvspec.config import DecodeConfig
    from lvspec.evaluation.evaluate import evaluate
    from lvspec.evaluation.intervals import CONFIDENCE
    from lvspec.evaluation.methods import EvaluationInterrupted
    from lvspec.evaluation.ways import ways

    names = ("max_new_tokens", "gamma", "draft_keep", "cache_dtype")
    given: dict[str, Any] = {n: v for n in names if (v := getattr(arguments, n)) is not None}
    config = DecodeConfig(**given, trace=arguments.trace)
    ways(arguments.methods, config=config)  # a name that is none is said before models are loaded
    models = load_quietly(arguments)
    confidence = CONFIDENCE if arguments.confidence is None else arguments.confidence
    interrupted = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about each clip anew
            done = evaluate(
                models.target,
                models.draft,
                samples,
                processor=models.processor,
                draft_processor=models.draft_processor,
                out=arguments.out,
                methods=arguments.methods,
                config=config,
                profile=arguments.profile,
                metrics=arguments.metric,
                judge=judge,
                num_frames=arguments.num_frames,
                fps=arguments.fps,
                confidence=confidence,
            )
    except EvaluationInterrupted as stopped:
        interrupted, done = True, stopped.results
    if interrupted and not any(row["captions"] for row in done.rows):
        say("interrupted before the first caption")
        return 130
    print_evaluation(done, judge=judge is not None, confidence=confidence)
    if interrupted:
        say(f"interrupted; what was captioned is in {arguments.out}, the same command goes on")
        return 130
    return 0 if done.is_complete else 1
