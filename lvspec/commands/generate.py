"""lvspec generate: captions of video files by any pair of checkpoints."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lvspec.commands import say
from lvspec.policy import PRESETS, AcceptancePolicy

DTYPES = ("auto", "float32", "bfloat16", "float16")
POLICY_OPTIONS: dict[str, tuple[type, str]] = {
    "anchor_threshold": (float, "visual relevance from which on nothing is loose (write =-inf)"),
    "max_regret": (float, "largest regret in nats"),
    "top_k": (int, "the token must be among this many best of the target"),
    "min_prob": (float, "smallest target probability"),
    "typical_eps": (float, "epsilon of typical acceptance"),
    "typical_delta": (float, "delta of typical acceptance"),
    "min_entropy": (float, "smallest entropy of the best tokens in nats"),
    "entropy_top": (int, "how many tokens --min-entropy looks at"),
    "shift_window": (int, "how many positions a right token may be off"),
    "window": (int, "exact tokens that must follow a mismatch"),
    "max_run": (int, "mismatches in a row at most"),
    "regret_budget": (float, "summed regret in nats at most, for each caption"),
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `generate`."""
    summary = "caption videos with a target and a draft"
    parser = subparsers.add_parser("generate", help=summary, description=summary)
    parser.set_defaults(func=run)
    add = parser.add_argument
    add("--video", nargs="+", action="extend", required=True, metavar="FILE", help="video files")
    add("--prompt", required=True, metavar="TEXT", help="what is asked of every video")
    add("--gamma", type=int, metavar="N", help="draft tokens per verify pass, 1 to 63 (default 12)")
    add("--tree", metavar="NAME", help="draft a named tree (specvlm) instead of a chain")
    add(
        "--adaptive",
        action="store_true",
        default=None,
        help="draft chains as long as acceptance so far makes worth it, --gamma at most",
    )
    add("--max-new-tokens", type=int, metavar="N", help="tokens at most (default 256)")
    add("--cache-capacity", type=int, metavar="N", help="positions of the KV cache (as needed)")
    add("--stream", action="store_true", help="print text as it is committed, without colours")
    add("--json", metavar="FILE", help="write captions, tokens, statistics and the environment")

    models = parser.add_argument_group(
        "models",
        "folders of checkpoints, or names in the hub's cache; the embedded pair by default",
    )
    models.add_argument("--target", metavar="PATH")
    models.add_argument("--draft", metavar="PATH")
    models.add_argument("--no-draft", action="store_true", help="plain autoregression")
    models.add_argument("--dtype", choices=DTYPES, default="auto", help="(default: %(default)s)")
    models.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 (a GPU if there is one)"
    )
    models.add_argument("--threads", type=int, metavar="N", help="torch threads on the CPU")

    frames = parser.add_argument_group("frames").add_mutually_exclusive_group()
    frames.add_argument("--fps", type=float, metavar="X", help="frames per second (default 2)")
    frames.add_argument("--num-frames", type=int, metavar="N", help="frames of each video")

    policy = parser.add_argument_group(
        "policy", "what may be accepted: a preset, and changes to it"
    )
    policy.add_argument("--policy", choices=PRESETS, default="lvspec", help="(default: lvspec)")
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


def run(arguments: argparse.Namespace) -> int:
    """Caption the videos: everything that needs no model is checked first.

    Raises:
        OSError, ValueError: Bad input.
    """
    policy = _policy(arguments)
    _check_options(arguments)
    obstacles = {path: obstacle for path in arguments.video if (obstacle := _obstacle(path))}
    if len(obstacles) == len(set(arguments.video)):
        for obstacle in obstacles.values():
            say(obstacle, kind="error")
        return 2

    from lvspec.config import DecodeConfig

    chosen = {
        name: value
        for name in ("gamma", "tree", "adaptive", "max_new_tokens", "cache_capacity")
        if (value := getattr(arguments, name)) is not None
    }
    config = DecodeConfig(**chosen)

    from lvspec.commands.captioning import caption_videos

    return caption_videos(arguments, policy, config, obstacles)


def _policy(arguments: argparse.Namespace) -> AcceptancePolicy:
    given = {
        field: value for field in POLICY_OPTIONS if (value := getattr(arguments, field)) is not None
    }
    if arguments.strict_ids:
        given["strict_ids"] = tuple(arguments.strict_ids)
    return AcceptancePolicy.preset(arguments.policy, **given)


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
    if draft is not None and target is None:
        raise ValueError(f"--target: expected one beside --draft {draft}, got none")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {arguments.threads}")
    if arguments.num_frames is not None and arguments.num_frames < 2:
        raise ValueError(
            f"--num-frames: expected at least 2, because one frame is a picture and no video, got "
            f"{arguments.num_frames}"
        )
    if arguments.fps is not None and not 0 < arguments.fps < float("inf"):
        raise ValueError(f"--fps: expected a number > 0, got {arguments.fps}")
    if arguments.json is not None:
        from lvspec.environment import check_json_path

        check_json_path(arguments.json)
        place = Path(arguments.json).resolve()
        if any(Path(video).resolve() == place for video in arguments.video):
            raise ValueError(f"--json: expected another file than the videos, got {arguments.json}")


def _obstacle(path: str) -> str | None:
    """Why this cannot be a video file, as far as that shows without opening it."""
    if not os.path.exists(path):
        return f"--video: expected a file, got {path}: no such file"
    if os.path.isdir(path):
        return f"--video: expected a file, got the folder {path}"
    return None
