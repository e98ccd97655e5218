"""generate: draft, verify, accept, commit, until the caption ends."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lvspec.accept import accept
from lvspec.attention import lvspec_attention_on
from lvspec.cache import SlotCache
from lvspec.commit import DecodeState, commit
from lvspec.config import DecodeConfig
from lvspec.draft import ModelDrafter
from lvspec.models import Model, check_inputs, check_pair
from lvspec.policy import AcceptancePolicy
from lvspec.relevance import get_scorer
from lvspec.stats import DecodeStats
from lvspec.trace import Generation, Trace
from lvspec.tree import chain_ancestors
from lvspec.verify import DraftShape, verify


class NonFiniteLogits(RuntimeError):
    """The target's logits were NaN. `generation` holds what was generated before."""

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message)
        self.generation = generation


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C while generating. `generation` holds what was generated before."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(f"interrupted after {generation.tokens.shape[1]} tokens")
        self.generation = generation


@torch.inference_mode()
def generate(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    inputs: Mapping[str, Any],
    *,
    policy: AcceptancePolicy | None = None,
    config: DecodeConfig | None = None,
    draft_inputs: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
) -> Generation:
    """Generate greedily with the target, sooner.

    Greedy is the largest logit. Logits processors of a generation config, such as a repetition
    penalty, are not applied; HF's `generate(do_sample=False)` does apply them.

    With `AcceptancePolicy.strict()` the tokens are HF's greedy ones, up to near ties: a block of
    rows rounds differently from one row, so where two logits differ by rounding alone (less than
    1e-4 in float32) the other token may be taken. In bfloat16 and float16 this happens more often.

    Args:
        target: HF model of a supported family (`lvspec.models.FAMILIES`), unchanged.
        draft: A smaller model with the same tokenizer, on the same device. None generates token by
            token: plain autoregression over the same cache.
        inputs: What the target's processor returns for one prompt: `input_ids` `[1, T]`, pixels,
            grids.
        policy: Which draft tokens may be accepted; None is `AcceptancePolicy.lvspec()`.
            `AcceptancePolicy.strict()` gives the target's own greedy tokens.
        config: How to draft and run; None is `DecodeConfig()`.
        draft_inputs: The prompt as the draft's processor returns it, where it differs.
        tokenizer: For `Generation.text`.
        streamer: An HF streamer: gets the prompt, then tokens as they are committed. None is ever
            taken back.

    Returns:
        The tokens, what kind each is, and statistics.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it, what was expected and
            what came.
        NonFiniteLogits: The target's logits were NaN; carries what was generated.
        GenerationInterrupted: Ctrl-C; carries what was generated.
    """
    config = DecodeConfig() if config is None else config
    policy = AcceptancePolicy.lvspec() if policy is None else policy
    _check_type("config", config, DecodeConfig)
    _check_type("policy", policy, AcceptancePolicy)
    target_model = Model(target, "target", capture=config.capture)
    target_inputs = check_inputs(target_model, inputs)
    drafter = None
    if draft is not None:
        draft_model = Model(draft, "draft", capture=config.capture)
        check_pair(target_model, draft_model)
        drafter = ModelDrafter(
            draft_model, gamma=config.gamma, target_vocab=target_model.vocab_size
        )
        draft_inputs = check_inputs(draft_model, inputs if draft_inputs is None else draft_inputs)
    run = _Run(target_model, drafter, target_inputs, policy, config)
    run.tokenizer, run.streamer = tokenizer, streamer
    with ExitStack() as attention:
        try:
            run.prefill(draft_inputs)
            attention.enter_context(lvspec_attention_on(target_model.text))
            if drafter is not None:
                attention.enter_context(drafter.active())
            while run.goes_on():
                run.iterate()
        except KeyboardInterrupt:
            raise GenerationInterrupted(run.result()) from None
    if streamer is not None:
        streamer.end()
    return run.result()


class _Run:
    """One generation under way."""

    def __init__(
        self,
        target: Model,
        drafter: ModelDrafter | None,
        inputs: dict[str, Any],
        policy: AcceptancePolicy,
        config: DecodeConfig,
    ) -> None:
        self.target, self.drafter, self.config = target, drafter, config
        self.inputs = inputs
        self.prompt: Tensor = inputs["input_ids"]
        device = target.device
        gamma = config.gamma if drafter is not None else 0
        self.num_slots = gamma + 1
        self.eos_ids = config.eos_ids
        if self.eos_ids is None:
            self.eos_ids = policy.eos_ids or _eos_ids(target.hf)
        self.policy = replace(policy, eos_ids=self.eos_ids)
        scorer = get_scorer(config.scorer)
        wants_scores = drafter is not None and (policy.needs_relevance or config.trace)
        self.scorer = scorer if wants_scores else None
        self.shape = DraftShape.chain(gamma, device) if drafter is not None else None
        self.stats = DecodeStats(device, gamma)
        self.trace = Trace() if config.trace else None
        self.state: DecodeState | None = None
        self.cache: SlotCache | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.streamer: BaseStreamer | None = None
        self._root_only = (
            torch.zeros(1, dtype=torch.int64, device=device),
            chain_ancestors(1, batch_size=1, device=device),
        )

    def prefill(self, draft_inputs: Mapping[str, Any] | None) -> None:
        """Read the prompt with both models; the target's last row gives the first token."""
        length = self.prompt.shape[1]
        needed = length + self.config.max_new_tokens + self.num_slots
        capacity = self.config.cache_capacity or needed
        if capacity < needed:
            raise ValueError(
                f"cache_capacity: expected at least {needed} (a prompt of {length}, max_new_tokens="
                f"{self.config.max_new_tokens}, {self.num_slots} slots), got {capacity}"
            )
        with self.stats.timer.phase("prefill"):
            self.cache = self.target.new_cache(
                batch_size=1, capacity=capacity, num_slots=self.num_slots
            )
            logits = self.target.prefill(self.inputs, self.cache, 0)
            if self.drafter is not None:
                # One kv_len counts the rows of both caches.
                draft_length = draft_inputs["input_ids"].shape[1]
                if draft_length != length:
                    raise ValueError(
                        f"draft_inputs: expected a prompt of {length} tokens like the target's, "
                        f"got {draft_length}"
                    )
                self.drafter.prefill(draft_inputs, capacity=capacity)
        self._stop_on_nan(logits.max(-1).values, "the prompt")
        self.state = DecodeState(
            self.prompt[:, -1],
            logits.argmax(-1),
            max_new_tokens=self.config.max_new_tokens,
            num_slots=self.num_slots,
            eos_ids=torch.tensor(self.eos_ids, dtype=torch.int64, device=self.target.device),
            regret_dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32,
        )
        self._stream(self.prompt[0])
        self._stream(self.state.out_ids[0, :1])

    def goes_on(self) -> bool:
        return not bool(self.state.finished.all())

    def iterate(self) -> None:
        """One iteration: at most gamma draft tokens and one of the target's own."""
        before = int(self.state.num_out)
        if self.drafter is None:
            self._one_token()
        else:
            self._draft_and_verify()
        self._stream(self.state.out_ids[0, before : int(self.state.num_out)])

    def _draft_and_verify(self) -> None:
        state, cache, timer = self.state, self.cache, self.stats.timer
        with timer.phase("draft"):
            drafted = self.drafter.propose(state.last_two, cache.kv_len)
            tokens = torch.cat([state.last_two[:, 1:], drafted], dim=1)
        with timer.phase("verify"):
            verification = verify(self.target, cache, tokens, self.shape, self.scorer)
        with timer.phase("accept"):
            acceptance, logit_stats = accept(
                verification, tokens, self.shape, self.policy, state.regret_used, cache.workspace
            )
        # What is no slot counts as the root, which is on every path.
        self._stop_on_nan(logit_stats.lse.gather(1, acceptance.path.long().clamp(min=0)))
        with timer.phase("commit"):
            commit(state, cache, tokens, acceptance, verification.relevance)
        self.stats.record(acceptance.num_accepted)
        if self.trace is not None:
            self.trace.record(
                tokens,
                logit_stats.top_ids[..., 0],
                verification.relevance,
                acceptance.num_accepted,
                acceptance.kind,
            )

    def _one_token(self) -> None:
        state, cache, timer = self.state, self.cache, self.stats.timer
        with timer.phase("verify"):
            depths, ancestors = self._root_only
            logits = self.target.step(state.last_two[:, 1:], depths, ancestors, cache).logits
            best = logits[:, -1].max(-1)
        self._stop_on_nan(best.values)
        with timer.phase("commit"):
            place = state.num_out[:, None].long()
            state.out_ids.scatter_(1, place, best.indices[:, None])
            state.last_two = torch.cat([state.last_two[:, 1:], best.indices[:, None]], dim=1)
            state.num_out += 1
            state.finished |= torch.isin(best.indices, state.eos_ids)
            state.finished |= state.num_out >= state.max_new_tokens
            cache.kv_len += 1
        self.stats.record(torch.zeros_like(state.num_out))

    def _stop_on_nan(self, values: Tensor, where: str | None = None) -> None:
        if not bool(values.isnan().any()):
            return
        row = int(values.isnan().int().argmax())
        where = where or f"iteration {self.stats.num_iterations}, row {row}"
        generation = self.result()
        raise NonFiniteLogits(
            f"target: expected finite logits, got NaN at {where}; "
            f"{generation.tokens.shape[1]} tokens were generated before",
            generation,
        )

    def _stream(self, tokens: Tensor) -> None:
        if self.streamer is not None and tokens.numel():
            self.streamer.put(tokens.cpu())

    def result(self) -> Generation:
        """What there is so far; ordinary tensors, for a caption may become a label in training."""
        state = self.state
        with torch.inference_mode(False):
            if state is None:
                tokens = self.prompt[:, :0].clone()
                kinds, relevance = tokens.to(torch.uint8), tokens.float()
            else:
                count = int(state.num_out)
                tokens, kinds, relevance = (
                    output[:, :count].clone()
                    for output in (state.out_ids, state.out_kinds, state.out_relevance)
                )
                self.stats.close(kinds[0], state.regret_used)
            return Generation(
                torch.cat([self.prompt, tokens], dim=1),
                tokens,
                kinds,
                relevance,
                self.stats,
                self.trace,
                self.tokenizer,
            )


def _check_type(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {value!r}")


def _eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """End-of-sequence ids of the model's generation config, or of its text config."""
    generation_config = getattr(model, "generation_config", None)
    for config in (generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (found,)
    return ()
