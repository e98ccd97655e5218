"""lvspec evaluate: methods side by side over a user's own videos, or a data set on disk."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

from lvspec.cli.options import (
    CALL_OPTIONS,
    DRAFT_WORDS,
    errors_by_option,
    gamma_of,
    options_of,
)
from lvspec.cli.say import say
from lvspec.evaluation.datasets import READERS, read_dataset
from lvspec.evaluation.judge import Judge
from lvspec.evaluation.samples import Problem, Samples, read_manifest, samples_of_folder

OPTIONS = {
    **CALL_OPTIONS,
    **options_of(("videos", "dataset", "methods", "metric", "confidence", "out", "profile")),
    "samples": "--manifest, --videos, --dataset",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
DRAFT_WEIGHTS = ("int8", "int4", "fp8")
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

    models = parser.add_argument_group("models", "the embedded pair by default")
    models.add_argument("--target", metavar="PATH")
    models.add_argument("--draft", metavar="PATH", help="or self, or ngram")
    models.add_argument("--dtype", choices=DTYPES, default="auto", help="(default: %(default)s)")
    models.add_argument("--draft-weights", choices=DRAFT_WEIGHTS, help="needs torchao")
    models.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1")
    models.add_argument("--threads", type=int, metavar="N", help="torch threads on the CPU")
    frames = parser.add_argument_group("frames").add_mutually_exclusive_group()
    frames.add_argument("--fps", type=float, metavar="X", help="frames per second (default 2)")
    frames.add_argument("--num-frames", type=int, metavar="N", help="frames of each video, >= 2")


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
    target, draft = arguments.target, arguments.draft
    if target is not None and draft is None:
        raise ValueError(f"--draft: expected one beside --target {target}, got none")
    if target is None and draft is not None and draft not in DRAFT_WORDS:
        raise ValueError(f"--target: expected one beside --draft {draft}, got none")
    if arguments.videos is not None and not (arguments.prompt or "").strip():
        raise ValueError("--prompt: expected a text beside --videos, got none")
    if arguments.videos is None and arguments.prompt is not None:
        raise ValueError("--prompt: expected --videos beside it; other samples have their prompts")
    for name, least in (("threads", 1), ("num_frames", 2), ("clips", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected at least {least}, got {value}")
    if arguments.fps is not None and not 0 < arguments.fps < math.inf:
        raise ValueError(f"--fps: expected a number > 0, got {arguments.fps}")
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
    if arguments.videos is not None:
        found = samples_of_folder(arguments.videos, arguments.prompt)
    elif arguments.dataset is not None:
        found = read_dataset(*arguments.dataset)
    else:
        try:
            found = read_manifest(arguments.manifest)
        except OSError as error:
            raise type(error)(
                f"--manifest: expected a file that can be read, got {arguments.manifest}: "
                f"{error.strerror}"
            ) from error
    return Samples(found.samples[: arguments.clips], found.problems)


def _say_problems(problems: Sequence[Problem]) -> None:
    for problem in problems[:_SHOWN]:
        say(problem, kind="error")
    if len(problems) > _SHOWN:
        say(f"and {len(problems) - _SHOWN} more, all in the summary", kind="error")


def _evaluate(arguments: argparse.Namespace, samples: Samples, judge: Judge | None) -> int:
    import torch
    from transformers.utils import logging as transformers_logging

    from lvspec.cli.checkpoints import find_device, load_models
    from lvspec.cli.evaluation_table import print_evaluation
    from lvspec.config import DecodeConfig
    from lvspec.evaluation.evaluate import evaluate
    from lvspec.evaluation.intervals import CONFIDENCE
    from lvspec.evaluation.methods import EvaluationInterrupted
    from lvspec.evaluation.ways import ways

    names = ("max_new_tokens", "gamma", "draft_keep")
    given: dict[str, Any] = {n: v for n in names if (v := getattr(arguments, n)) is not None}
    config = DecodeConfig(**given, trace=arguments.trace)
    ways(arguments.methods, config=config)  # a name that is none is said before models are loaded
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    models = load_models(
        arguments.target,
        arguments.draft,
        with_draft=True,
        dtype=arguments.dtype,
        device=find_device(arguments.device),
        draft_weights=arguments.draft_weights,
    )
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
