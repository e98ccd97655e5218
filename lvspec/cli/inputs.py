"""What calibrate and evaluate are given alike: samples, a pair, frames."""

from __future__ import annotations

import argparse
import glob
import importlib.util
import math
import os
from typing import TYPE_CHECKING, Any

from lvspec.cli.options import BY_TORCHAO, CACHE_DTYPES, DRAFT_WORDS, DTYPES, WEIGHTS
from lvspec.evaluation.samples import (
    Samples,
    read_manifest,
    samples_of_folder,
    samples_of_pattern,
)

if TYPE_CHECKING:
    from lvspec.cli.checkpoints import Models


def add_pair_options(parser: argparse.ArgumentParser, *, draft: str) -> None:
    """The groups "models" and "frames".

    Args:
        parser: Of a sub-command.
        draft: What `--draft` may be besides a checkpoint.
    """
    models = parser.add_argument_group("models", "the embedded pair by default")
    models.add_argument("--target", metavar="PATH")
    models.add_argument("--draft", metavar="PATH", help=draft)
    models.add_argument("--dtype", choices=DTYPES, default="auto", help="(default: %(default)s)")
    add_weights_options(models)
    models.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1")
    models.add_argument("--threads", type=int, metavar="N", help="torch threads on the CPU")
    frames = parser.add_argument_group("frames").add_mutually_exclusive_group()
    frames.add_argument("--fps", type=float, metavar="X", help="frames per second (default 2)")
    frames.add_argument("--num-frames", type=int, metavar="N", help="frames of each video, >= 2")


def add_weights_options(models: argparse._ArgumentGroup) -> None:
    """`--draft-weights`, `--target-weights` and `--cache-dtype`."""
    models.add_argument(
        "--draft-weights",
        choices=WEIGHTS,
        help="quantise the draft (int8, int4: needs torchao; int4: bfloat16 on a GPU)",
    )
    models.add_argument(
        "--target-weights",
        choices=WEIGHTS,
        help="quantise the target, but for its head: what it says is then its own",
    )
    models.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="of keys and values: auto, the model's (default), or fp8, a byte each",
    )


def check_weights(arguments: argparse.Namespace, *, has_draft_model: bool) -> None:
    """Refuse what cannot be quantised.

    Raises:
        ValueError: There is no draft model, or no torchao; names the option.
    """
    if arguments.draft_weights is not None and not has_draft_model:
        given = f"--draft {arguments.draft}" if arguments.draft else "--no-draft"
        raise ValueError(
            f"--draft-weights: expected a draft model to quantise, got {given} and "
            f"{arguments.draft_weights}"
        )
    for role in ("draft", "target"):
        weights = getattr(arguments, f"{role}_weights")
        if weights in BY_TORCHAO and importlib.util.find_spec("torchao") is None:
            raise ValueError(
                f"--{role}-weights: expected torchao, which is not installed (pip install "
                f"lvspec[quant]), got {weights}"
            )


def check_inputs(arguments: argparse.Namespace, *, least_clips: int) -> None:
    """Refuse what needs no model to be found wrong.

    Raises:
        ValueError: An option is; names it.
    """
    check_pair_options(arguments)
    check_least(arguments, "clips", least_clips)
    if arguments.videos is not None and not (arguments.prompt or "").strip():
        raise ValueError("--prompt: expected a text beside --videos, got none")
    if arguments.videos is None and arguments.prompt is not None:
        raise ValueError("--prompt: expected --videos beside it; other samples have their prompts")


def check_pair_options(arguments: argparse.Namespace) -> None:
    """Refuse what `add_pair_options` added, where no model is needed to find it wrong.

    Raises:
        ValueError: An option is; names it.
    """
    target, draft = arguments.target, arguments.draft
    if target is not None and draft is None:
        raise ValueError(f"--draft: expected one beside --target {target}, got none")
    if target is None and draft is not None and draft not in DRAFT_WORDS:
        raise ValueError(f"--target: expected one beside --draft {draft}, got none")
    check_weights(arguments, has_draft_model=draft not in DRAFT_WORDS)
    check_least(arguments, "threads", 1)
    check_least(arguments, "num_frames", 2)
    if arguments.fps is not None and not 0 < arguments.fps < math.inf:
        raise ValueError(f"--fps: expected a number > 0, got {arguments.fps}")


def check_least(arguments: argparse.Namespace, name: str, least: int) -> None:
    """Refuse a number below `least`; None is none."""
    value = getattr(arguments, name)
    if value is not None and value < least:
        raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def read_samples(arguments: argparse.Namespace, **manifest: Any) -> Samples:
    """Those of `--videos` or `--manifest`.

    Args:
        arguments: With both, and `prompt`.
        **manifest: As for `read_manifest`.

    Raises:
        OSError, ValueError: Neither can be read; names the option.
    """
    if arguments.videos is not None:
        is_pattern = glob.has_magic(arguments.videos) and not os.path.isdir(arguments.videos)
        find = samples_of_pattern if is_pattern else samples_of_folder
        return find(arguments.videos, arguments.prompt)
    try:
        return read_manifest(arguments.manifest, **manifest)
    except OSError as error:
        raise type(error)(
            f"--manifest: expected a file that can be read, got {arguments.manifest}: "
            f"{error.strerror}"
        ) from error


def load_quietly(arguments: argparse.Namespace) -> Models:
    """The models of the options; transformers shows no bar, torch has the threads asked for.

    Raises:
        OSError, ValueError: As `lvspec.cli.checkpoints.load_models`.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from lvspec.cli.checkpoints import find_device, load_models

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return load_models(
        arguments.target,
        arguments.draft,
        with_draft=True,
        dtype=arguments.dtype,
        device=find_device(arguments.device),
        draft_weights=arguments.draft_weights,
        target_weights=arguments.target_weights,
    )
