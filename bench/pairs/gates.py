"""Other gates than those that ship, for the ablation: scores of rows that may look at anything.

A scorer of `lvspec` sees what a pass of the target returns. A candidate here also sees the draft,
both models and their caches, and what it saw before: what it would take to ship one that is no
better need not be built. Batches of one, chains, on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.engine.engine import Engine
from lvspec.engine.result import Generation
from lvspec.evaluation.methods import Method, Output, decoder_method
from lvspec.models.loading import Pair
from lvspec.models.text_pass import StepOutput
from lvspec.phases.relevance import attention_mass, attention_peak
from lvspec.phases.slots import Draft
from lvspec.policy import AUTO, AcceptancePolicy
from lvspec.reference.gate import gate
from lvspec.rule import GATE_BINS
from lvspec.shapes.calibration import area_under_curve
from lvspec.shapes.evaluation import Clip

NUM_HEADS = 10


@dataclass(frozen=True)
class Rows:
    """The rows of one pass of the target.

    Attributes:
        output: What it returned, with scores.
        draft: What it read.
        engine: Whose pass it was; the models' caches hold what stands before the draft.
    """

    output: StepOutput
    draft: Draft
    engine: Engine

    @property
    def is_first(self) -> bool:
        """Whether no pass of this sequence was before it."""
        return int(self.engine.state.num_out[0]) == 1

    def step(self, role: str) -> StepOutput:
        """The target or the draft over these slots once more, with scores."""
        drafter, cache = self.engine.drafter, self.engine.cache
        length, shape = cache.kv_len.clone(), self.draft.shape
        model = self.engine.target
        if role == "draft":
            model, cache = drafter.model, drafter.cache
        before = cache.kv_len.clone()
        cache.kv_len.copy_(length)
        output = model.step(self.draft.tokens, shape.depths, shape.ancestors, cache, scores=True)
        cache.kv_len.copy_(before)
        return output


Score = Callable[[Rows], Tensor]
"""Relevance of rows, float32 `[1, S]`, as a scorer gives it."""


class GateDecoder(Decoder):
    """A decoder whose rows are scored by a candidate.

    Args:
        pair, policy, config: As for `Decoder`; chains of a number of tokens that is said.
        score: Of every row; may be exchanged between two captions.
    """

    def __init__(
        self, pair: Pair, policy: AcceptancePolicy, config: DecodeConfig, score: Score
    ) -> None:
        self.score = score
        config = replace(config, scorer=self._scored)
        super().__init__(
            pair.target, pair.draft, policy, config, tokenizer=pair.processor.tokenizer
        )
        self._plain, self.engine.drafter.propose = self.engine.drafter.propose, self._propose

    def _propose(self, *arguments: Tensor) -> Draft:
        self._draft = self._plain(*arguments)
        return self._draft

    def _scored(self, output: StepOutput) -> Tensor:
        return self.score(Rows(output, self._draft, self.engine))

    def method(self, score: Score, policy: AcceptancePolicy) -> Method:
        """What a candidate says of a clip under this policy; the passes are those of all others."""
        run = decoder_method(self, policy)

        def scored(clip: Clip) -> Output:
            self.score = score
            return run(clip)

        return scored


class Running:
    """Peaks against those of all rows of the sequence so far, this pass included.

    Args:
        of: Relevance `[1, S]` of peaks `[1, S]`, from the peaks so far `[n]`.
    """

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._of = of

    def __call__(self, rows: Rows) -> Tensor:
        peak = attention_peak(rows.output)
        seen = peak[0, : int(rows.draft.shape.num_slots[0])]
        self._seen = seen if rows.is_first else torch.cat([self._seen, seen])
        return self._of(peak, self._seen)


def over_mean(peak: Tensor, seen: Tensor) -> Tensor:
    return peak / seen.mean()


def rank(peak: Tensor, seen: Tensor) -> Tensor:
    """The share of the rows so far that look less."""
    return (seen < peak[..., None]).float().mean(-1)


def without_sink(rows: Rows) -> Tensor:
    """The peak as a share of what a head does not give to the first token of the prompt."""
    peaks, visual = rows.output.peaks.clone(), rows.engine.cache.visual
    kept = visual.clone()
    visual.zero_()
    visual[:, 0] = 1  # so that the mass is the sink's
    sink = rows.step("target").masses
    visual.copy_(kept)
    return (peaks / (1 - sink).clamp(min=1e-3)).mean(dim=(0, 2))


def draft_peak(rows: Rows) -> Tensor:
    """How much the draft looks at the video where it proposes."""
    return attention_peak(rows.step("draft"))


def both_peaks(rows: Rows) -> Tensor:
    """The geometric mean of both models' peaks."""
    own = attention_peak(rows.output).clone()
    return (own * draft_peak(rows)).sqrt()


def doubt(rows: Rows) -> Tensor:
    """The probability that the draft gives to other tokens than its best."""
    return 1 - rows.step("draft").logits.float().softmax(-1).amax(-1)


def entropy(rows: Rows) -> Tensor:
    """Of the draft's row, as a share of the largest that there can be."""
    logs = rows.step("draft").logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1) / math.log(logs.shape[-1])


def peak_and_doubt(rows: Rows) -> Tensor:
    """The geometric mean of the target's peak and the draft's doubt."""
    own = attention_peak(rows.output).clone()
    return (own * doubt(rows)).sqrt()


def layers(first: float, last: float) -> Score:
    """The peak over the layers between these shares of the depth; one at least."""

    def score(rows: Rows) -> Tensor:
        depth = len(rows.output.peaks)
        start = min(int(first * depth), depth - 1)
        chosen = range(start, max(int(last * depth), start + 1))
        return attention_peak(rows.output, layers=chosen)

    return score


SHIPPED: dict[str, Score] = {
    "peak": layers(0, 1),
    "mass": lambda rows: attention_mass(rows.output),
    "later half": layers(0.5, 1),
}
"""Those that scripts compare candidates with."""


def heads(chosen: Tensor) -> Score:
    """The peak over these heads, int64 `[n]`, numbered through all layers."""
    return lambda rows: rows.output.peaks.transpose(1, 2).flatten(0, 1)[chosen].mean(0)


def every_head(rows: Rows) -> Tensor:
    """The peaks of the heads of all layers, `[1, heads, S]`."""
    return rows.output.peaks.transpose(0, 1).flatten(1, 2).clone()


def collect(
    pair: Pair,
    clips: list[Clip],
    config: DecodeConfig,
    scores: dict[str, Score],
    anchors: Callable[[Generation], list[bool]],
) -> tuple[dict[str, Tensor], Tensor]:
    """As `lvspec.shapes.calibration.collect_scores`, of many candidates in one run.

    Returns:
        What each gives at every token of the target's captions but the first, float32 `[..., n]`,
        and bool `[n]`, whether it is an anchor.
    """
    read: list[dict[str, Tensor]] = []
    numbered = 0

    def number(rows: Rows) -> Tensor:
        nonlocal numbered
        read.append({name: score(rows)[0] for name, score in scores.items()})
        slots = rows.output.peaks.shape[-1]
        numbered += slots
        return torch.arange(numbered - slots, numbered)[None].float()

    decoder = GateDecoder(pair, AcceptancePolicy.strict(), replace(config, trace=True), number)
    found = [decoder.generate(clip.inputs) for clip in clips]
    numbers = torch.cat([result.relevance[0, 1:] for result in found]).long()
    flags = torch.tensor([flag for result in found for flag in anchors(result)[1:]])
    return {
        name: torch.cat([block[name] for block in read], dim=-1)[..., numbers] for name in scores
    }, flags


def split(scores: Tensor) -> float:
    """How far Otsu's two kinds of rows are apart, in standard deviations of their logarithms."""
    policy = AcceptancePolicy.lvspec()
    count = torch.tensor([len(scores)], dtype=torch.int32)
    seen = torch.zeros(1, GATE_BINS, dtype=torch.int32)
    found, _ = gate(scores[None], count, torch.tensor([policy.rule]), seen)
    above = scores >= found[0, policy.rule._fields.index("anchor_threshold")]
    if above.all():
        return 0.0
    logs = scores.clamp(min=2.0**-16).log2()
    high, low = logs[above], logs[~above]
    within = (high.var(correction=0) + low.var(correction=0)) / 2
    return float((high.mean() - low.mean()) / within.sqrt().clamp(min=1e-6))


def best_heads(peaks: Tensor, worth: Callable[[Tensor], float]) -> Tensor:
    """The `NUM_HEADS` heads of most worth, int64; all where there are not more."""
    return torch.tensor([worth(head) for head in peaks]).argsort(descending=True)[:NUM_HEADS]


def candidates(peaks: Tensor, flags: Tensor) -> dict[str, tuple[Score, float | str]]:
    """Scores by name, each with the `anchor_threshold` that it is for.

    Args:
        peaks, flags: Of `every_head` by `collect`, of other clips than are evaluated.
    """
    by_label = best_heads(peaks, lambda head: area_under_curve(head, flags))
    return {
        "running mean": (Running(over_mean), 1.0),
        "running median": (Running(rank), 0.5),
        "running quantile .75": (Running(rank), 0.75),
        "third quarter": (layers(0.5, 0.75), AUTO),
        "last quarter": (layers(0.75, 1), AUTO),
        "best heads": (heads(by_label), AUTO),
        "heads that split": (heads(best_heads(peaks, split)), AUTO),
        "without the sink": (without_sink, AUTO),
        "draft's peak": (draft_peak, AUTO),
        "both peaks": (both_peaks, AUTO),
        "draft's doubt": (doubt, AUTO),
        "draft's entropy": (entropy, AUTO),
        "peak and doubt": (peak_and_doubt, AUTO),
    }
