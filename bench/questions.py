"""Several questions about one clip: `generate(..., prompts=[...])` against a call for each.

    python bench/questions.py [--questions 8] [--clips 4] [--rounds 3] [--max-new-tokens 24]
        [--frames 8] [--json FILE]

Milliseconds of the embedded pair, strict, one thread: reading the file for each question or once,
and the models, prefill included; medians of clips and rounds in which both take turns. Answers must
be those that each has alone, up to near ties of float32, and how many are is shown.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from measuring import script

import lvspec
from lvspec.shapes.clips import write_clip
from lvspec.shapes.pair import load_embedded_pair
from lvspec.shapes.scenes import scenes

PARTS = "read for each", "a call for each", "read once", "prompts=[...]"
WORDS = "describe the video.", "describe the video. describe", "the video. describe the"


def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--frames", type=int, default=8)
    arguments = script.begin(parser)
    torch.set_num_threads(1)
    pair = load_embedded_pair()
    config = lvspec.DecodeConfig(gamma=12, max_new_tokens=arguments.max_new_tokens)
    policy = lvspec.AcceptancePolicy.strict()
    asked = [f"{WORDS[n % len(WORDS)]}{' the' * n}" for n in range(arguments.questions)]
    models = pair.target, pair.draft, policy, config
    alone = lvspec.Decoder(*models)
    together = lvspec.Decoder(*models, batch_size=arguments.questions)
    clock = time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        videos = []
        for index, scene in enumerate(scenes("evaluation", arguments.clips)):
            videos.append(Path(folder, f"{index}.mp4"))
            write_clip(scene, videos[-1], seed=index)
        frames = {"num_frames": arguments.frames}
        for turn in range(arguments.rounds + 1):
            same = 0
            for video in videos:
                times = [clock()]
                inputs = [pair.processor(video, text, **frames) for text in asked]
                times.append(clock())
                each = [alone.generate(one) for one in inputs]
                times.append(clock())
                inputs = pair.processor(video, asked, **frames)
                times.append(clock())
                prompts = [one["input_ids"] for one in inputs]
                shared = together.generate(inputs[0], prompts=prompts)
                times.append(clock())
                same += sum(a.tokens.equal(b.tokens) for a, b in zip(each, shared, strict=True))
                if turn:  # the first is to warm up
                    for name, begin, end in zip(PARTS, times, times[1:], strict=False):
                        seconds[name].append(end - begin)
    rows = [(name, f"{1000 * median(found):.0f}") for name, found in seconds.items()]
    script.print_table(["", "ms a clip"], rows, title=f"{arguments.questions} questions")
    quads = list(zip(*seconds.values(), strict=True))
    models = median(each / once for _, each, _, once in quads)
    gain = median((a + b) / (c + d) for a, b, c, d in quads)
    total = arguments.questions * arguments.clips
    print(f"{gain:.2f}x, the models alone {models:.2f}x; {same} of {total} answers as each alone")
    figures = {"seconds": seconds, "gain": gain, "models": models, "same": same, "answers": total}
    script.finish(arguments, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
