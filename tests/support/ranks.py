"""What one of the processes that share a target does in tests.

A folder has prompts.pt, the inputs of a batch; what the process finds goes there too. Jobs: "ways",
every way of drafting; "die", the last rank is killed in the middle; "stall", it stops instead;
"fail", something of the user's raises there alone; "families", each of the folders has a target and
its inputs.
"""

import json
import os
import signal
from pathlib import Path

import torch

from lvspec import AcceptancePolicy, AnchorTree, DecodeConfig, Decoder, DynamicTree, generate
from lvspec.engine.frames import frame_attention
from lvspec.models import pulse
from lvspec.models.loading import load_pair, load_part
from lvspec.models.ranks import join, ranks_of

STRICT = AcceptancePolicy.strict()
LOOSE = AcceptancePolicy(anchor_threshold=0.14, top_k=5, shift_window=2)
"""As of models with random weights: what is loose there costs many nats."""

ANY = AcceptancePolicy(anchor_threshold=float("inf"))
EOS = {"eos_ids": (), "max_new_tokens": 16}
WAYS = {
    "autoregression": (None, STRICT, {}),
    "chain": ("model", STRICT, {"gamma": 4}),
    "chain, loose": ("model", LOOSE, {"gamma": 4}),
    "chain, chosen by the clock": ("model", STRICT, {"gamma": "auto"}),
    "tree": ("model", STRICT, {"tree": DynamicTree(2, 3)}),
    "tree, loose": ("model", LOOSE, {"tree": DynamicTree(2, 3)}),
    "self": ("self", STRICT, {"gamma": 4, "draft_keep": 0.5}),
    "self, loose": ("self", LOOSE, {"gamma": 4, "draft_keep": 0.5}),
    "self, anchor tree": ("self", LOOSE, {"gamma": 3, "tree": AnchorTree(2, 2), "draft_keep": 0.5}),
    "n-grams": ("ngram", STRICT, {"gamma": 4, "ngram_max": 1}),
    "n-grams, loose": ("ngram", ANY, {"gamma": 4, "ngram_max": 1}),
    "sampling": ("model", LOOSE, {"gamma": 4, "temperature": 0.8, "seed": 1}),
    "sampling, tree": ("model", LOOSE, {"tree": "specvlm", "temperature": 0.8, "seed": 1}),
    "by HF's forward": ("model", LOOSE, {"gamma": 4, "fuse": "none"}),
    "float8 caches": ("model", LOOSE, {"gamma": 4, "cache_dtype": "fp8"}),
}


def run(pair, prompts, name, own_policy=None):
    """What a way gives: tokens, kinds and relevance of each prompt, and how it was run."""
    draft, policy, options = WAYS[name]
    policy = policy if own_policy is None else own_policy
    draft = pair.draft if draft == "model" else draft
    decoder = Decoder(
        pair.target, draft, policy, DecodeConfig(**{**EOS, **options}), batch_size=len(prompts)
    )
    found = decoder.generate(prompts)
    return {
        "tokens": [each.tokens[0].tolist() for each in found],
        "kinds": [each.kinds[0].tolist() for each in found],
        "relevance": [each.relevance[0].nan_to_num(-1).tolist() for each in found],
        "passes": found[0].stats.passes,
        "parts": found[0].stats.parts["target"],
        "tau": found[0].stats.tau,
        "drafted": found[0].stats.num_drafted,
        "gamma": found[0].stats.gamma,
        "heads": list(decoder.engine.cache.k.shape[:3]),
    }


def run_family(target, folder):
    """Tokens of a target that drafts for itself, whose code ran, and where it looked."""
    inputs = torch.load(folder / "inputs.pt")
    config = DecodeConfig(gamma=4, draft_keep=0.5, **EOS)
    found = generate(target, "self", inputs, policy=LOOSE, config=config)
    tokens = found.tokens[0].tolist()
    frames = frame_attention(target, inputs, tokens, frames=int(folder.name[-1]))
    mass = frames.mass.nan_to_num(-1).tolist()
    return {"tokens": tokens, "passes": found.stats.passes["target"], "mass": mass}


def run_parted(pair, prompts, is_first):
    """A chain; another rank than the first drafts other tokens, and would accept them all."""
    if is_first:
        return run(pair, prompts, "chain")
    with torch.no_grad():
        for weight in pair.draft.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return run(pair, prompts, "chain", ANY)


class Trouble:
    """A streamer that makes trouble after some tokens."""

    def __init__(self, job):
        self.job, self.left = job, 3

    def put(self, tokens):
        self.left -= 1
        if self.left == 0 and self.job == "fail":
            raise OSError("nobody listens")
        if self.left == 0:
            os.kill(os.getpid(), {"die": signal.SIGKILL, "stall": signal.SIGSTOP}[self.job])

    def end(self):
        pass


def main(job, folders, folder, number, size, port):
    """What a rank does; what it writes to stderr is in the folder afterwards."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    folder = Path(folder)
    errors = open(folder / f"{job}{number}.txt", "w")
    os.dup2(errors.fileno(), 2)
    if job == "families":
        ranks = join()
        found = {each.name: run_family(load_part(each, ranks), each) for each in folders}
        (folder / f"{number}.json").write_text(json.dumps(found))
        return
    pair = load_pair(*folders, dtype=torch.float64, tensor_parallel=True)
    ranks = ranks_of(pair.target.model.language_model)
    prompts = torch.load(folder / "prompts.pt")
    if job == "ways":
        pulse.SILENCE = 600.0  # of a machine that is in haste elsewhere
        found = {name: run(pair, prompts, name) for name in WAYS}
        found["parted"] = run_parted(pair, prompts, ranks.is_first)
        found["numbers"] = numbers_of(pair.target)
        (folder / f"{number}.json").write_text(json.dumps(found))
        return
    streamer = Trouble(job) if number == ranks.size - 1 else None
    config = DecodeConfig(gamma=2, max_new_tokens=100, eos_ids=())
    Decoder(pair.target, pair.draft, STRICT, config).generate(prompts[0], streamer=streamer)


def numbers_of(target):
    """Weights of the text model that this process has."""
    return sum(weight.numel() for weight in target.model.language_model.parameters())
