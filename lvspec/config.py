"""DecodeConfig: how to draft and run. What may be accepted is the policy's matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lvspec.checks import check_count, check_number, check_share, token_ids
from lvspec.tree import MAX_SLOTS
from lvspec.tree_shapes import AnchorTree, SkipTree, Tree, check_slots, check_tree

DRAFT_ANCHOR_THRESHOLD = 0.065
GAMMA = 12
"""Draft tokens of a chain where the number is not said and not chosen."""
KEEP_BY = ("attention", "uniform")
Fuse = Literal["kernels", "none"]
FUSE: tuple[Fuse, ...] = get_args(Fuse)
"""Whose code may run passes, see `DecodeConfig.fuse`."""
CacheDtype = Literal["auto", "fp8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = get_args(CacheDtype)


@dataclass(frozen=True)
class DecodeConfig:
    """How a generation is run.

    Args:
        gamma: Draft tokens of a chain per verify pass, 1 to 63. Not read where `tree` says how many
            there are. "auto": for plain chains of a model what is found best when a run begins, by
            the time that passes of both models take, measured once, and the share of tokens that
            was accepted so far (`engine/length.py`); `DecodeStats.gamma` and `gamma_choice` say
            what that is, and a run with this number is the same run. With a
            temperature the bytes of the weights decide, so that a seed repeats a run by itself. For
            other ways to draft it is 12.
        acceptance: Chance that a drafted token is accepted, in (0, 1), for `gamma="auto"` alone.
            None: what earlier generations of these models and this policy showed, and before that
            a guess by the policy. A run's own is `1 - 1 / tau` for long chains, and more for short
            ones.
        tree: None drafts a chain. A name in `tree_shapes.NAMED_TREES` or a list of paths drafts a
            static tree, in Medusa's naming: `(0, 2)` is the third choice behind the best first
            token. `DynamicTree` grows by probability, `AnchorTree` where the draft looks at the
            video, `SkipTree` where the draft may have inserted or left out a word.
        cost_ratio: What a draft step costs, in passes of the target, for `gamma="auto"`. None: as
            measured.
        stop_at_unsure_anchors: None, or a probability: a chain ends before a token that the video
            decides, by the draft's attention, and of which the draft is less sure than this.
        draft_anchor_threshold: Visual peak of a draft's row from which on the video decides its
            token, for `stop_at_unsure_anchors` and `AnchorTree`.
        draft_vocab: Ids that a draft model may propose, as `lvspec.frequent_tokens` finds them;
            None: all. Its head is then made of their rows alone: the logits of these ids are what
            they were, and a pass reads less. End-of-sequence ids are always among them, or no draft
            could end a caption. Other tokens are left to the target: tau may fall, what a strict
            policy gives is the same.
        draft_keep: Share of the prompt's video tokens that the draft's cache keeps, 1.0 to 0.0;
            image tokens count as video. Each keeps its own position, and the text is kept whole.
        draft_keep_by: Which of them: "attention", those that the target looks at from the end of
            the prompt, up to 40 % of that attention, and others at even distances (SpecVLM's rule);
            or "uniform", at even distances.
        ngram_max: N-grams: the last `ngram_max` tokens are looked up, then fewer, >= 1.
        draft_ngram: Tokens that are looked up for every pass of the draft model, which drafts as
            many of them at once as it agrees with (FLy's drafter for the drafter); 0: none.
        draft_passes: Passes of the draft in one iteration with `draft_ngram`, 1 to `gamma`; None:
            `gamma`. Fewer make shorter chains where little is found. A CPU leaves out those behind
            a whole chain by itself.
        max_new_tokens: Tokens to generate at most, the end-of-sequence token included, >= 1.
        cache_capacity: Positions of the KV cache. None: what prompt, `max_new_tokens` and one draft
            need. A prompt that does not fit raises ValueError.
        cache_dtype: What the KV caches of target and draft hold. "auto": numbers of the model's
            dtype. "fp8": float8_e4m3fn, a byte each, with a factor for every head of a sequence
            that its prompt decides. Prompts are read without that; later tokens see rounded keys
            and values, so other tokens may be said: those of the target with such a cache, which
            `strict()` gives whoever drafts. On CUDA from compute capability 8.9 on; on a CPU a pass
            is then no single operation.
        eos_ids: End-of-sequence ids. None: the policy's, or if it has none, those of the target's
            generation config.
        temperature: 0 is greedy: the target's choice is its largest logit. Above 0 the choice is a
            sample of `softmax(logits / temperature)`.
        top_k: Sample from the `top_k` largest logits only, >= 1; None: from all.
        top_p: Sample from the fewest tokens that together have at least this probability, in
            (0, 1]; applied behind `top_k`, as HF does. None: from all.
        generation_config: Whether what the target's generation config says of logits is applied as
            HF's `generate` applies it: penalties, bans, forced tokens, least lengths, watermarks
            (`DecodeStats.generation_config` says what that was). Sampling, `max_new_tokens` and
            stop strings are said here and in `generate`, never by the generation config. A setting
            that looks at earlier tokens, such as a repetition penalty, is worked out for every
            drafted token by itself, and on CUDA iterations are then no graph.
        seed: Of the samples. A sequence's depend on it, on the index of the request and on nothing
            else. None: drawn from torch's global generator.
        scorer: Visual relevance of a row: a name in `phases.relevance.SCORERS`, or a function of
            the target's `StepOutput` that returns float32 `[B, S]`.
        capture: Whether to replay what is the same in every iteration without HF's Python. On CUDA
            a whole iteration is captured in a CUDA graph (`engine/graph.py`); elsewhere it changes
            nothing. Modules with hooks are never captured.
        lag: How many iterations late the host looks at what was generated, from 0 to 8; the output
            does not depend on it. With 1 the device never waits for the host, and computes one
            iteration in vain when a sequence ends by an end of sequence or a stop; with 0 nothing
            is in vain, and between two iterations the device waits for the host to look. None: 1 on
            CUDA, 0 on a CPU, whose work is done when the host looks.
        fuse: Whose code runs the text models' passes. "kernels": lvspec's own over HF's weights
            (`models/text_pass.py`), wherever a model has the parts of a plain decoder; what is not
            known in it is called as it is. "none": HF's forward. `stats.passes` says which it was.
        trace: Whether to keep what happened to every drafted token (`Generation.trace`).

    Raises:
        TypeError: A count is not an integer, a value not a number, or a tree is none.
        ValueError: A value is out of range, or two options exclude each other; `top_k` and `top_p`
            are for a temperature.
    """

    gamma: int | Literal["auto"] = "auto"
    acceptance: float | None = None
    tree: Tree | None = None
    cost_ratio: float | None = None
    stop_at_unsure_anchors: float | None = None
    draft_anchor_threshold: float = DRAFT_ANCHOR_THRESHOLD
    draft_vocab: tuple[int, ...] | None = None
    draft_keep: float = 1.0
    draft_keep_by: Literal["attention", "uniform"] = "attention"
    ngram_max: int = 3
    draft_ngram: int = 0
    draft_passes: int | None = None
    max_new_tokens: int = 256
    cache_capacity: int | None = None
    cache_dtype: CacheDtype = "auto"
    eos_ids: tuple[int, ...] | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generation_config: bool = True
    seed: int | None = None
    scorer: str | Callable[..., Tensor] = "attention_peak"
    capture: bool = True
    lag: int | None = None
    fuse: Fuse = "kernels"
    trace: bool = False

    def __post_init__(self) -> None:
        self._check_gamma()
        if self.draft_vocab is not None:
            # Ascending: of equal logits the lowest id counts, as in a whole head.
            object.__setattr__(self, "draft_vocab", token_ids("draft_vocab", self.draft_vocab))
            if not self.draft_vocab:
                raise ValueError("draft_vocab: expected at least one token id, or None, got none")
        check_share("draft_keep", self.draft_keep)
        if self.draft_keep_by not in KEEP_BY:
            raise ValueError(
                f"draft_keep_by: expected one of {', '.join(KEEP_BY)}, got {self.draft_keep_by!r}"
            )
        if not isinstance(self.generation_config, bool):
            raise TypeError(
                "generation_config: expected True or False (the target's own, target."
                f"generation_config, is applied or not), got {self.generation_config!r}"
            )
        for name, known in (("fuse", FUSE), ("cache_dtype", CACHE_DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        check_count("ngram_max", self.ngram_max)
        if self.draft_ngram != 0:
            check_count("draft_ngram", self.draft_ngram, most=MAX_SLOTS - 2)
        if self.draft_passes is not None:
            check_count("draft_passes", self.draft_passes, most=self.fixed_gamma)
        check_count("max_new_tokens", self.max_new_tokens)
        if self.cache_capacity is not None:
            check_count("cache_capacity", self.cache_capacity)
        if self.lag is not None:
            check_count("lag", self.lag, least=0, most=8)
        if self.cost_ratio is not None and not 0 < self.cost_ratio < float("inf"):
            raise ValueError(f"cost_ratio: expected a number > 0, got {self.cost_ratio}")
        confidence = self.stop_at_unsure_anchors
        if confidence is not None and not 0 < confidence <= 1:
            raise ValueError(
                f"stop_at_unsure_anchors: expected a probability > 0 and <= 1, got {confidence}"
            )
        if self.tree is not None:
            object.__setattr__(self, "tree", check_tree(self.tree))
            self._check_tree_options()
        if self.draft_ngram and confidence:
            raise ValueError(
                f"stop_at_unsure_anchors: expected none with draft_ngram={self.draft_ngram}"
            )
        self._check_sampling()

    def _check_gamma(self) -> None:
        if self.gamma != "auto":
            check_count("gamma", self.gamma, most=MAX_SLOTS - 1)
        if self.acceptance is None:
            return
        check_number("acceptance", self.acceptance)
        if not 0 < self.acceptance < 1:
            raise ValueError(f"acceptance: expected a chance in (0, 1), got {self.acceptance}")

    def _check_tree_options(self) -> None:
        for name in ("stop_at_unsure_anchors", "draft_ngram"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: expected a chain (tree=None), for which alone it is, got "
                    f"tree={self.tree!r}"
                )
        if isinstance(self.tree, SkipTree) and self.fixed_gamma < 2:
            raise ValueError(f"gamma: expected at least 2 with a SkipTree, got {self.gamma}")
        if isinstance(self.tree, (AnchorTree, SkipTree)):
            check_slots("gamma + tree.nodes", 1 + self.fixed_gamma + self.tree.nodes)

    @property
    def chooses_gamma(self) -> bool:
        """Whether a chain of a model is as long as is found best."""
        others = (self.tree, self.stop_at_unsure_anchors, self.draft_ngram)
        return self.gamma == "auto" and not any(others)

    @property
    def fixed_gamma(self) -> int:
        """Draft tokens of a chain where nothing chooses them."""
        return GAMMA if self.gamma == "auto" else self.gamma

    @property
    def samples(self) -> bool:
        """Whether the target's choice is a sample."""
        return self.temperature > 0

    def _check_sampling(self) -> None:
        check_number("temperature", self.temperature)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and not self.samples:
                raise ValueError(
                    f"{name}: expected None with temperature=0, which samples nothing, got "
                    f"{getattr(self, name)}"
                )
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            check_number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise TypeError(f"seed: expected an integer, got {self.seed!r}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {self.seed}")

    @classmethod
    def specvlm(cls, **overrides: Any) -> DecodeConfig:
        """How SpecVLM drafts: its static tree, by a draft that keeps a tenth of the video.

        With `AcceptancePolicy.strict()` this is the lossless baseline of LVSpec's paper.
        """
        return cls(**{"tree": "specvlm", "draft_keep": 0.1, **overrides})
