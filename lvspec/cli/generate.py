"""lvspec generate: captions of video files by any pair of checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from lvspec.cli.inputs import add_weights_options, check_weights
from lvspec.cli.options import (
    CALL_OPTIONS,
    CONFIG_OPTIONS,
    DRAFT_WORDS,
    DTYPES,
    POLICY_OPTIONS,
    errors_by_option,
    gamma_of,
    options_of,
)
from lvspec.cli.say import say
from lvspec.environment import number_on_machine
from lvspec.policy import PRESETS, AcceptancePolicy
from lvspec.profile import Profile


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `generate`."""
    summary = "caption videos with a target and a draft"
    parser = subparsers.add_parser("generate", help=summary, description=summary)
    parser.set_defaults(func=run)
    add = parser.add_argument
    add("--video", nargs="+", action="extend", required=True, metavar="FILE", help="video files")
    add("--prompt", required=True, metavar="TEXT", help="what is asked of every video")
    add("--max-new-tokens", type=int, metavar="N", help="tokens at most (default 256)")
    add("--cache-capacity", type=int, metavar="N", help="positions of the KV cache (as needed)")
    add("--stream", action="store_true", help="print text as it is committed, without colours")
    add("--json", metavar="FILE", help="write captions, tokens, statistics and the environment")
    add("--trace", action="store_true", help="write all that was drafted, too (needs --json)")

    models = parser.add_argument_group(
        "models",
        "folders of checkpoints, or names in the hub's cache; the embedded pair by default",
    )
    models.add_argument("--target", metavar="PATH")
    models.add_argument(
        "--draft",
        metavar="PATH",
        help="or self: the target drafts, or ngram: what stood there before (a folder: ./self)",
    )
    models.add_argument("--no-draft", action="store_true", help="plain autoregression")
    models.add_argument("--dtype", choices=DTYPES, default="auto", help="(default: %(default)s)")
    add_weights_options(models)
    models.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 (a GPU if there is one)"
    )
    models.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="the target over the processes that torchrun has started (torchrun --nproc-per-node N "
        "-m lvspec generate ...), a GPU each; the draft is whole on all of them",
    )
    models.add_argument("--threads", type=int, metavar="N", help="torch threads on the CPU")

    models.add_argument(
        "--ignore-generation-config",
        action="store_true",
        help="leave out the target's own penalties and bans (its generation_config.json)",
    )

    _add_draft_options(parser.add_argument_group("drafts", "how they are made"))
    sampling = parser.add_argument_group("sampling", "without a temperature: greedy")
    sampling.add_argument("--temperature", type=float, metavar="X", help="(default 0: greedy)")
    sampling.add_argument("--sample-top-k", type=int, metavar="N", help="from the N best only")
    sampling.add_argument(
        "--sample-top-p", type=float, metavar="X", help="from the fewest with this probability"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="repeats a run, >= 0")

    frames = parser.add_argument_group("frames").add_mutually_exclusive_group()
    frames.add_argument("--fps", type=float, metavar="X", help="frames per second (default 2)")
    frames.add_argument("--num-frames", type=int, metavar="N", help="frames of each video, >= 2")

    policy = parser.add_argument_group(
        "policy", "what may be accepted: a preset, and changes to it"
    )
    policy.add_argument(
        "--policy", choices=PRESETS, help="(default: lvspec; strict for --draft ngram)"
    )
    policy.add_argument(
        "--profile", metavar="FILE", help="policy and drafts as lvspec calibrate found them"
    )
    for field, (kind, meaning) in POLICY_OPTIONS.items():
        option = f"--{field.replace('_', '-')}"
        metavar = "X" if kind is float else "N"
        policy.add_argument(option, type=kind, metavar=metavar, help=meaning)
    policy.add_argument(
        "--strict-words", nargs="+", default=[], metavar="WORD", help="never part of a mismatch"
    )
    policy.add_argument(
        "--strict-ids", nargs="+", type=int, default=[], metavar="ID", help="the same, as token ids"
    )


def _add_draft_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--gamma",
        type=gamma_of,
        metavar="N",
        help="draft tokens per verify pass, 1 to 63, or auto (default): what is found best for a "
        "plain chain of a model, 12 elsewhere; as that goes by the clock, two runs under a loose "
        "policy may differ in words, and the N that a run printed repeats it",
    )
    add(
        "--acceptance",
        type=float,
        metavar="X",
        help="chance that a drafted token is accepted, for --gamma auto (default: as seen so far)",
    )
    add(
        "--cost-ratio",
        type=float,
        metavar="X",
        help="a draft step in passes of the target, for --gamma auto (default: as measured)",
    )
    add("--tree", metavar="NAME", help="draft a named tree (specvlm) instead of a chain")
    add(
        "--draft-vocab",
        metavar="FILE",
        help="draft only tokens of the captions in this file, which --json wrote before",
    )
    add(
        "--draft-keep",
        type=float,
        metavar="X",
        help="share of the video that the draft keeps, 0 to 1 (default 1; SpecVLM: 0.1)",
    )
    add(
        "--draft-keep-by",
        choices=("attention", "uniform"),
        help="what the target looks at, or even distances (default attention)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Caption the videos: everything that needs no model is checked first.

    Raises:
        OSError, ValueError: Bad input.
    """
    if arguments.tensor_parallel:
        number_on_machine("--tensor-parallel")
    with errors_by_option(options_of((*POLICY_OPTIONS, "strict_ids", "profile"))):
        policy = _policy(arguments)
    _check_options(arguments)
    obstacles = {path: obstacle for path in arguments.video if (obstacle := _obstacle(path))}
    if len(obstacles) == len(set(arguments.video)):
        for obstacle in obstacles.values():
            say(obstacle, kind="error")
        return 2

    from lvspec.config import DecodeConfig

    chosen = {
        name.removeprefix("sample_"): value  # --top-k is the policy's
        for name in CONFIG_OPTIONS
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.profile is not None:
        chosen |= Profile.read(arguments.profile).config
    if arguments.draft_vocab is not None:
        chosen["draft_vocab"] = _tokens_in(arguments.draft_vocab)
    chosen["generation_config"] = not arguments.ignore_generation_config
    chosen["trace"] = arguments.trace
    with errors_by_option(CALL_OPTIONS):
        config = DecodeConfig(**chosen)

    from lvspec.cli.captioning import caption_videos

    return caption_videos(arguments, policy, config, obstacles)


def _tokens_in(path: str) -> tuple[int, ...]:
    """Every token of the captions that an earlier run left in a file."""
    from lvspec.phases.draft.vocabulary import frequent_tokens

    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        captions = [result["tokens"] for result in results if "tokens" in result]
        return frequent_tokens(captions, sys.maxsize)
    except OSError as error:
        raise ValueError(
            f"--draft-vocab: expected a file that --json wrote, got {path}: {error.strerror}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--draft-vocab: expected captions that --json wrote, got {path}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _policy(arguments: argparse.Namespace) -> AcceptancePolicy:
    given = {
        field: value for field in POLICY_OPTIONS if (value := getattr(arguments, field)) is not None
    }
    if arguments.profile is not None:
        _check_alone(arguments)
        found = AcceptancePolicy.from_profile(arguments.profile)
        return replace(found, strict_ids=(*found.strict_ids, *arguments.strict_ids))
    if arguments.strict_ids:
        given["strict_ids"] = tuple(arguments.strict_ids)
    preset = arguments.policy or ("strict" if arguments.draft == "ngram" else "lvspec")
    return AcceptancePolicy.preset(preset, **given)


_SAID_BY_PROFILE = (
    *("policy", *POLICY_OPTIONS, "gamma", "acceptance", "cost_ratio", "tree", "draft_vocab"),
    *("draft_keep", "draft_keep_by", "cache_dtype", "temperature"),
)
"""Options that would make other settings of those that were calibrated."""


def _check_alone(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict a profile."""
    for field in _SAID_BY_PROFILE:
        value = getattr(arguments, field)
        if value is not None:
            raise ValueError(
                f"--{field.replace('_', '-')}: expected none beside --profile, which holds all "
                f"settings of what was calibrated, got {value}"
            )
    if arguments.no_draft:
        raise ValueError("--no-draft: expected a draft beside --profile, got none")


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse what contradicts itself or cannot work with any video.

    Raises:
        OSError, ValueError: Names the option, what was expected and what came.
    """
    target, draft = arguments.target, arguments.draft
    if draft is not None and arguments.no_draft:
        raise ValueError(f"--draft, --no-draft: expected one of them, got both (draft {draft})")
    if target is not None and draft is None and not arguments.no_draft:
        raise ValueError(
            f"--draft: expected one beside --target {target} (or --no-draft), got none"
        )
    if draft is not None and draft not in DRAFT_WORDS and target is None:
        raise ValueError(f"--target: expected one beside --draft {draft}, got none")
    if arguments.tensor_parallel and arguments.device is not None:
        raise ValueError(
            "--device, --tensor-parallel: expected one of them, as each process has the GPU of its "
            f"number, got --device {arguments.device}"
        )
    if arguments.tensor_parallel and arguments.profile is not None:
        raise ValueError(
            "--profile, --tensor-parallel: expected one of them, as a profile is compared with the "
            f"weights of the whole target, got --profile {arguments.profile}"
        )
    if arguments.tensor_parallel and arguments.target_weights is not None:
        raise ValueError(
            "--target-weights, --tensor-parallel: expected one of them, as transformers reads each "
            f"process's part as it is stored, got --target-weights {arguments.target_weights}"
        )
    check_weights(arguments, has_draft_model=not arguments.no_draft and draft not in DRAFT_WORDS)
    for option, texts in (
        ("--prompt", [arguments.prompt]),
        ("--strict-words", arguments.strict_words),
    ):
        for text in texts:
            if not _is_text(text):
                raise ValueError(f"{option}: expected text in UTF-8, got {text!r}")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {arguments.threads}")
    if arguments.num_frames is not None and arguments.num_frames < 2:
        raise ValueError(
            f"--num-frames: expected at least 2, because one frame is a picture and no video, got "
            f"{arguments.num_frames}"
        )
    if arguments.fps is not None and not 0 < arguments.fps < float("inf"):
        raise ValueError(f"--fps: expected a number > 0, got {arguments.fps}")
    if arguments.trace and arguments.json is None:
        raise ValueError("--trace: expected --json FILE beside it, where the trace goes, got none")
    if arguments.json is not None:
        from lvspec.environment import check_json_path

        check_json_path(arguments.json)
        path = Path(arguments.json).resolve()
        if any(Path(video).resolve() == path for video in arguments.video):
            raise ValueError(f"--json: expected another file than the videos, got {arguments.json}")


def _is_text(word: str) -> bool:
    """Whether a word of the command line is more than bytes of some other encoding."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _obstacle(path: str) -> str | None:
    """Why this cannot be a video file, as far as that shows without opening it."""
    if not os.path.exists(path):
        return f"--video: expected a file, got {path}: no such file"
    if os.path.isdir(path):
        return f"--video: expected a file, got the folder {path}"
    return None
