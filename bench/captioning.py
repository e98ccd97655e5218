"""A folder of clips: `lvspec caption` against a loop over `generate`, reading of files included.

    python bench/captioning.py FOLDER [--batch-size 8] [--workers 1] [--rounds 3] [--threads 1]
        [--json FILE]

Tokens per second of the embedded pair from the first clip that is ready to the last row: loading
models and starting processes left out on both sides. Medians of rounds in which both take turns,
the first of which counts too: what is made once is made before it. CPU seconds a clip say what a
machine with a core for each process would take, however busy this one is: those of the process with
the models, and of all processes that decode, starting included.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import script

import lvspec
from lvspec.captioning.preparing import Checkpoints
from lvspec.captioning.run import caption
from lvspec.captioning.shards import lines_of
from lvspec.evaluation.samples import Sample, samples_of_folder
from lvspec.shapes.pair import TARGET, load_embedded_pair

PROMPT = "describe the video."
CONFIG = lvspec.DecodeConfig(gamma=12, max_new_tokens=160)
POLICY = lvspec.AcceptancePolicy.lvspec()


def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = script.begin(parser)
    torch.set_num_threads(arguments.threads)
    samples = samples_of_folder(arguments.folder, PROMPT).samples
    pair = load_embedded_pair()
    decoder = lvspec.Decoder(
        pair.target, pair.draft, POLICY, CONFIG, tokenizer=pair.processor.tokenizer
    )
    decoder.generate(pair.processor(samples[0].video, PROMPT))  # to warm up
    loops, loop_cpu, captions = [], [], []
    for _ in range(arguments.rounds):
        begin = time.process_time()
        loops.append(_loop(pair, decoder, samples))
        loop_cpu.append(time.process_time() - begin)
        captions.append(_caption(pair, samples, arguments))
    rates = {"loop": loops, "caption": [each["rate"] for each in captions]}
    same = median(each["same"] for each in captions)
    gain = median(fast / slow for slow, fast in zip(rates["loop"], rates["caption"]))
    cpu = {"loop": loop_cpu, "caption": [each["cpu"] for each in captions]}
    cpu["workers"] = [each["workers"] for each in captions]
    cpu = {name: [1000 * s / len(samples) for s in found] for name, found in cpu.items()}
    rows = [(name, f"{median(found):.1f}") for name, found in rates.items()]
    script.print_table(["", "tokens/s"], rows, title=f"{len(samples)} clips")
    rows = [(name, f"{median(found):.0f}") for name, found in cpu.items()]
    script.print_table(["", "CPU ms a clip"], rows)
    pace = captions[-1]["pace"]
    print(f"{gain:.2f}x; {same} of {len(samples)} captions as the loop's; {pace['limit']}")
    script.finish(
        arguments,
        {
            "clips": len(samples),
            "rates": rates,
            "cpu_ms": cpu,
            "gain": gain,
            "same": same,
            "pace": pace,
        },
    )
    return 0


_texts: dict[str, str] = {}
"""What the loop said, by clip."""


def _loop(pair: lvspec.Pair, decoder: lvspec.Decoder, samples: list[Sample]) -> float:
    tokens, start = 0, time.perf_counter()
    for sample in samples:
        result = decoder.generate(pair.processor(sample.video, sample.prompt))
        _texts[sample.id] = result.text
        tokens += result.tokens.shape[1]
    return tokens / (time.perf_counter() - start)


def _caption(pair: lvspec.Pair, samples: list[Sample], arguments: Any) -> dict[str, Any]:
    begin, before = time.process_time(), _of_children()
    with tempfile.TemporaryDirectory() as folder:
        done = caption(
            *(pair.target, pair.draft, samples),
            recipe=Checkpoints((str(TARGET),)),
            tokenizer=pair.processor.tokenizer,
            policy=POLICY,
            config=CONFIG,
            out=folder,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
        cpu, workers = time.process_time() - begin, _of_children() - before
        rows = [row for _, row in lines_of(Path(done.path))]
    same = sum(row["caption"] == _texts[row["id"]] for row in rows)
    rate = done.pace["tokens_per_second"]
    return {"rate": rate, "same": same, "pace": done.pace, "cpu": cpu, "workers": workers}


def _of_children() -> float:
    """CPU seconds of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
