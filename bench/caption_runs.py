"""`lvspec caption` as a process: killed at random moments and continued, and its memory over time.

    python bench/caption_runs.py FOLDER [--clips 400] [--kills 10] [--seed 0] [--batch-size 8]
        [--workers 1] [--max-new-tokens 160] [--num-frames N] [--pair TARGET DRAFT] [--json FILE]

The videos of a folder are captioned again and again, by other ids, with the embedded pair (or two
checkpoints) and one thread. A kill is SIGKILL to the process that has the models, some rows after
it has begun and some milliseconds behind the last of them, by the seed. In the end every id must be
there once, and every line whole, or the script fails. Memory is what is resident, as Linux counts
it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import script

from lvspec.captioning.shards import Shard, lines_of, part_of
from lvspec.evaluation.samples import samples_of_folder

PROMPT = "describe the video."
SAMPLES = 20
"""Lines of the table of memory."""


def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--pair", nargs=2, metavar=("TARGET", "DRAFT"))
    arguments = script.begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(arguments, Path(folder))
        killed = [runs.kill() for _ in range(arguments.kills)]
        sizes = runs.finish()
        rows = runs.rows()
    if sorted(row["id"] for row in rows) != sorted(map(str, range(arguments.clips))):
        raise SystemExit("expected every id once, got others")
    failed = sum(row["error"] is not None for row in rows)
    if killed:
        table = [[str(each[name]) for name in ("rows", "torn")] for each in killed]
        script.print_table(["rows when killed", "a torn line"], table)
    table = [[str(rows), *(f"{size / 2**20:.1f}" for size in mib)] for rows, *mib in sizes]
    script.print_table(["rows", "MiB", "of the worker processes"], table)
    print(f"{arguments.clips} ids, each once; {failed} failed; {len(killed)} kills")
    figures = {"killed": killed, "sizes": sizes, "failed": failed, "clips": arguments.clips}
    script.finish(arguments, figures)
    return 0


class Runs:
    """The same command, again and again.

    Args:
        arguments: Of this script.
        folder: For a manifest and rows.
    """

    def __init__(self, arguments: Any, folder: Path) -> None:
        self._out, self._clips = folder / "out", arguments.clips
        self._path = self._out / f"{Shard().stem}.jsonl"
        self._journal, self._seen, self._lines = part_of(self._path), 0, 0
        self._random = random.Random(arguments.seed)
        videos = [each.video for each in samples_of_folder(arguments.folder, PROMPT).samples]
        manifest = folder / "manifest.jsonl"
        with open(manifest, "w", encoding="utf-8") as file:
            for index in range(arguments.clips):
                video = os.path.abspath(videos[index % len(videos)])
                file.write(json.dumps({"id": str(index), "video": video}) + "\n")
        given = {
            "manifest": manifest,
            "prompt": PROMPT,
            "out": self._out,
            "batch-size": arguments.batch_size,
            "decode-workers": arguments.workers,
            "max-new-tokens": arguments.max_new_tokens,
            "gamma": min(12, arguments.max_new_tokens),
            "threads": 1,
            "device": "cpu",
        }
        if arguments.pair is not None:
            given["target"], given["draft"] = arguments.pair
        if arguments.num_frames is not None:
            given["num-frames"] = arguments.num_frames
        options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        self._command = [sys.executable, "-P", "-m", "lvspec", "caption", *options]

    def kill(self) -> dict[str, Any]:
        """Begin or go on, and kill it; how many rows there were then, and whether one was torn."""
        wanted = self._count() + self._random.randint(0, max(self._clips // 20, 1))
        with self._started() as process:
            while self._count() < wanted and process.poll() is None:
                time.sleep(0.01)
            time.sleep(self._random.uniform(0.0, 0.3))
            process.kill()
        lines = self._journal.read_bytes() if self._journal.exists() else b""
        rows = max(lines.count(b"\n") - 1, 0)  # there is a line above them
        return {"rows": rows, "torn": bool(lines) and not lines.endswith(b"\n")}

    def finish(self) -> list[tuple[int, int, int]]:
        """Go on to the end; now and then (rows, bytes of the process, of its workers)."""
        sizes: list[tuple[int, int, int]] = []
        step = max(self._clips // SAMPLES, 1)
        following = self._count() + step
        with self._started() as process:
            while process.poll() is None:
                count = self._count()
                if count >= following:
                    following = count + step
                    workers = sum(map(_resident, _children(process.pid)))
                    sizes.append((count, _resident(process.pid), workers))
                time.sleep(0.2)
        if process.returncode not in (0, 1):
            raise SystemExit(f"expected an exit code of 0 or 1, got {process.returncode}")
        return [each for each in sizes if each[1]]

    def rows(self) -> list[dict[str, Any]]:
        """Of the file that is whole."""
        return [row for _, row in lines_of(self._path)]

    def _started(self) -> subprocess.Popen:
        return subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def _count(self) -> int:
        """Lines of the journal, of which those that are new are read."""
        if self._journal.exists():
            with open(self._journal, "rb") as file:
                file.seek(self._seen)
                new = file.read()
            whole = new.rfind(b"\n") + 1
            self._seen += whole
            self._lines += new.count(b"\n", 0, whole)
        return self._lines


def _children(pid: int) -> Iterator[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        words = []
    yield from map(int, words)


def _resident(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
