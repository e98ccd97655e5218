"""A pair at a size: every way to decode it, each checked before it is timed.

Every figure has its limit: the bytes that must be read, over the bandwidth of the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from limits import Gpu, Setting, limit
from measuring import timing
from measuring.clock import figures, peak_gb, timed
from ops.reasons import Unavailable, Wrong
from pairs import huggingface as hf
from pairs.expected import other_parts, prediction
from pairs.pairs import Pair, Size
from pairs.random_models import RandomPromptModel, random_prompt
from pairs.replay import AcceptanceTrace, ReplayEngine, begin
from pairs.specvlm_step import SpecVLMStep
from torch import Tensor
from transformers import PreTrainedModel

from lvspec.config import DecodeConfig
from lvspec.engine.engine import Engine
from lvspec.models.hf_names import CACHE
from lvspec.phases.draft import CachedDrafter
from lvspec.tree import chain_ancestors

WARM_UP = 6
"""Iterations that are not timed: two by HF's Python, a capture, and some replays."""
COMPILES = 12
"""Tokens of HF's static cache within which it has compiled what it will."""


@dataclass(frozen=True)
class Plan:
    """How a row is measured.

    Attributes:
        config: Of our loop; `max_new_tokens` is enough for all iterations.
        trace: What is accepted.
        iterations: Timed ones.
    """

    config: DecodeConfig
    trace: AcceptanceTrace
    iterations: int

    @classmethod
    def of(cls, config: DecodeConfig, trace: AcceptanceTrace, iterations: int) -> Plan:
        """With room for whole drafts in all iterations of all methods."""
        tokens = (iterations + 2 * WARM_UP + 2) * (max(config.gamma, 25) + 1)
        config = replace(config, max_new_tokens=tokens, eos_ids=())
        return cls(config, trace, iterations)


@dataclass
class Row:
    """A pair at a size: who decodes, and what is known of it so far."""

    hf_target: PreTrainedModel
    hf_draft: PreTrainedModel
    pair: Pair
    size: Size
    plan: Plan

    def __post_init__(self) -> None:
        self.target = RandomPromptModel(self.hf_target, "target")
        self.draft = RandomPromptModel(self.hf_draft, "draft")
        self.device = self.target.device
        self.checks: dict[str, str] = {}
        self.first_tokens: dict[str, Tensor] = {}
        self.in_context = {"context": self.size.context, "batch_size": self.size.batch_size}

    def begin(self, **overrides: Any) -> Engine:
        """Our loop, replaying the trace; `overrides` are fields of the config."""
        config = replace(self.plan.config, **overrides)
        models = (self.hf_target, self.hf_draft)
        return begin(*models, config, trace=self.plan.trace, **self.in_context)

    def begin_alone(self) -> Engine:
        """Autoregression by our loop."""
        return begin(self.hf_target, None, self.plan.config, **self.in_context)

    def run_ours(self, name: str, engine: Engine) -> dict[str, Any]:
        """Warm up, keep the first tokens, and time."""
        with torch.inference_mode(), engine.attention():
            self._warm_up(name, engine)
            before = self._read(engine)
            wall, each = timed(engine.iterate, self.plan.iterations, self.device)
            after = self._read(engine)
        tokens = (after[0] - before[0]).double().mean().item() / self.plan.iterations
        if isinstance(engine, ReplayEngine):
            said = engine.replayed(WARM_UP, self.plan.iterations) + 1
            if not torch.equal(said.sum(0).int(), (after[0] - before[0]).cpu()):
                raise Wrong(f"{name}: expected {said.sum(0).tolist()} tokens, got {tokens}")
        length = (before[1] + after[1]).double().mean().item() / 2
        moved = self.moved_bytes(engine, length)
        expected = prediction(self.pair.name, self.plan.config.gamma)
        is_predicted = expected is not None and self.device.type == "cuda"
        is_usual = is_predicted and engine.config.fuse == "kernels"
        return {
            **figures(wall, each),
            "tokens_per_iteration": tokens,
            "loop": engine.runner.description,
            "parts": engine.parts,
            "other_parts": other_parts(engine.parts, expected["parts"]) if is_usual else [],
            "draft_passes": engine.drafter.depth,
            "mean_context": length,
            **self.against_limit(moved, wall),
            "memory_gb": peak_gb(self.device),
        }

    def _warm_up(self, name: str, engine: Engine) -> None:
        """The first iterations, whose tokens are kept to compare those of others with."""
        for _ in range(WARM_UP):
            engine.iterate()
        count = int(engine.state.num_out.min())
        self.first_tokens[name] = engine.state.out_ids[:, :count].clone()

    def _tokens_of(self, name: str, begin: Callable[[], Engine]) -> Tensor:
        """First tokens of a method that is not measured again: figures are kept, tokens are not."""
        if name not in self.first_tokens:
            engine = begin()
            with torch.inference_mode(), engine.attention():
                self._warm_up(name, engine)
        return self.first_tokens[name]

    @staticmethod
    def _read(engine: Engine) -> tuple[Tensor, Tensor]:
        return engine.state.num_out.clone(), engine.cache.kv_len.clone()

    def moved_bytes(self, engine: Engine, length: float) -> float:
        """Weights and cache that an iteration reads, of the models as the engine has them."""
        parts = [(engine.target.step_bytes, engine.cache, 1)]
        drafter = engine.drafter
        if isinstance(drafter, CachedDrafter):
            # A level is a pass of the draft, and so is a token of a chain.
            weights = drafter.model.step_bytes_with(drafter.head)
            parts.append((weights, drafter.cache, drafter.depth))
        total = 0.0
        for weights, cache, passes in parts:
            row = cache.k[:, 0, :, 0].nbytes + cache.v[:, 0, :, 0].nbytes
            total += passes * (weights + self.size.batch_size * length * row)
        return total

    def against_limit(self, moved: float, wall: float) -> dict[str, float]:
        bandwidth = timing.copy_bandwidth(self.device)
        best = moved / bandwidth
        return {"bytes": moved, "limit_ms": 1e3 * best, "share_of_limit": best / wall}

    def on_paper(self) -> dict[str, float]:
        """What `limits.py` says of this pair at the bandwidth of this run, without gaps."""
        item = self.target.text.dtype.itemsize
        gpu = Gpu("measured", timing.copy_bandwidth(self.device), 1e18, 1e18)
        tau, gamma = self.plan.trace.tau, self.plan.config.gamma
        found = limit(
            Setting(
                self.pair.target,
                self.pair.draft,
                gpu,
                context=self.size.context,
                batch=self.size.batch_size,
                gamma=gamma,
                tau=tau,
                weight_bytes=(item, item),
                gap=0.0,
                kv_item=item,
            )
        )
        return {
            "iteration_ms": found.iteration_ms,
            "autoregression_ms": found.autoregression_ms,
            "speedup": found.speedup,
        }

    # One function a method, in the order in which they run.

    def lvspec(self) -> dict[str, Any]:
        """Our loop as it is used: captured where it can be."""
        return self.run_ours("lvspec", self.begin())

    def autoregression(self) -> dict[str, Any]:
        """Our loop without a draft, captured like the rest; checked against HF's forward."""
        engine = self.begin_alone()
        self._check_logits(engine)
        found = self.run_ours("autoregression", engine)
        length = self.size.context
        ids, cache = self._ids(engine), hf.dynamic_cache(self.target, engine.cache, length)
        ours = self.first_tokens["autoregression"][:, 1:]
        if self.target.text.dtype in (torch.float32, torch.float64):
            theirs = hf.greedy(self.target.hf, ids, cache, ours.shape[1])
            if not torch.equal(theirs, ours):
                raise Wrong(f"expected HF's greedy tokens {theirs.tolist()}, got {ours.tolist()}")
            self.checks["autoregression"] = f"HF's greedy tokens, {ours.shape[1]} of them"
        return found

    def lvspec_eager(self) -> dict[str, Any]:
        """Our loop without capture; its first tokens must be those of the captured one."""
        found = self.run_ours("eager", self.begin(capture=False))
        mine = self._tokens_of("lvspec", self.begin)
        theirs = self.first_tokens["eager"]
        if torch.equal(mine, theirs):
            self.checks["captured"] = f"the eager loop's tokens, {mine.numel()} of them"
            return found
        first = int((mine != theirs).int().argmax())
        said = f"captured and eager loops differ from token {first} of {mine.numel()} on"
        if self.target.text.dtype in (torch.float32, torch.float64):
            raise Wrong(said)
        self.checks["captured"] = f"{said}, in {self.target.text.dtype}"
        return found

    def specvlm_tree(self) -> dict[str, Any]:
        """Our loop with SpecVLM's tree, to be compared with its step at equal tau."""
        return self.run_ours("tree", self.begin(tree="specvlm"))

    def hf_generate(self) -> dict[str, Any]:
        """HF's `generate`, eager, with its DynamicCache."""
        engine = self.begin_alone()
        ids = self._ids(engine)
        cache = hf.dynamic_cache(self.target, engine.cache, self.size.context)
        del engine
        return self._peer(hf.token_seconds(self.target.hf, ids, cache, self.plan.iterations))

    def hf_assisted(self) -> dict[str, Any]:
        """HF's assisted generation: a round is `gamma` draft passes and one of the target."""
        if self.size.batch_size > 1:
            raise Unavailable("takes one sequence only")
        ids, gamma = self._prompt(0), self.plan.config.gamma
        rounds, tokens = hf.assisted_rounds(
            self.target.hf, self.draft.hf, ids, gamma=gamma, count=self.plan.iterations // 2 + 2
        )
        if self.target.text.dtype in (torch.float32, torch.float64):
            theirs = hf.greedy(self.target.hf, ids, None, tokens.shape[1])
            if not torch.equal(theirs, tokens):
                raise Wrong(f"assisted: expected {theirs.tolist()}, got {tokens.tolist()}")
        return {**self._peer(rounds), "draft_passes": gamma}

    def specvlm_step(self) -> dict[str, Any]:
        """A SpecVLM-style eager step; strict, so its tokens are those of autoregression."""
        if self.size.batch_size > 1:
            raise Unavailable("takes one sequence only")
        engine = self.begin()
        caches = (
            hf.dynamic_cache(self.target, engine.cache, self.size.context),
            hf.dynamic_cache(self.draft, engine.drafter.cache, self.size.context),
        )
        root = engine.state.last_two[:, 1:].clone()
        del engine
        step = SpecVLMStep(self.target, self.draft, *caches, root)
        with torch.inference_mode(), step.attention():
            for _ in range(3):
                step.run()
            wall, each = timed(step.run, max(self.plan.iterations // 2, 5), self.device)
        if self.target.text.dtype in (torch.float32, torch.float64):
            wanted = self._tokens_of("autoregression", self.begin_alone)[0, 1:].tolist()
            count = min(len(wanted), len(step.output))
            if step.output[:count] != wanted[:count]:
                raise Wrong(f"specvlm: expected {wanted[:count]}, got {step.output[:count]}")
        return {**figures(wall, each), "draft_passes": 5}

    def hf_static(self) -> dict[str, Any]:
        """HF's `generate` with a static cache and its own torch.compile."""
        if self.device.type != "cuda":
            raise Unavailable("HF compiles on CUDA only")
        engine = self.begin_alone()
        ids, length, count = self._ids(engine), self.size.context, self.plan.iterations
        room = length + count + COMPILES + 8
        cache = hf.static_cache(self.target, engine.cache, length, room)
        del engine
        each = hf.token_seconds(self.target.hf, ids, cache, count, skip=COMPILES)
        is_compiled = vars(self.hf_target).pop("_compiled_call", None) is not None
        torch.compiler.reset()  # its own graphs keep memory
        return {**self._peer(each), "compiled": is_compiled}

    def _peer(self, seconds: list[float]) -> dict[str, Any]:
        return figures(statistics.fmean(seconds), [1e3 * value for value in seconds])

    def _ids(self, engine: Engine) -> Tensor:
        """int64 `[B, T + 1]`: prompts and the first token behind each."""
        prompts = [self._prompt(index) for index in range(self.size.batch_size)]
        return torch.cat([torch.cat(prompts), engine.state.out_ids[:, :1]], dim=1)

    def _prompt(self, index: int) -> Tensor:
        vocabulary = min(self.target.vocab_size, self.draft.vocab_size)
        return random_prompt(self.size.context, vocabulary, self.device, seed=index)

    def _check_logits(self, engine: Engine) -> None:
        """Logits of one row of ours against HF's forward with SDPA over the same cache.

        The same sums in other orders: every layer rounds its output once more, so the difference
        may grow with the root of their number.
        """
        root, device = engine.state.last_two[:, 1:], self.device
        batch_size = self.size.batch_size
        with torch.inference_mode():
            with engine.attention():
                ours = engine.target.step(
                    root,
                    torch.zeros(1, dtype=torch.int64, device=device),
                    chain_ancestors(1, batch_size=batch_size, device=device),
                    engine.cache,
                ).logits
            cache = hf.dynamic_cache(self.target, engine.cache, self.size.context)
            positions = torch.full((batch_size, 1), self.size.context, device=device)
            if self.target.family.position_rows > 1:
                positions = positions.expand(self.target.family.position_rows, -1, -1)
            hidden = self.target.text(
                input_ids=root, position_ids=positions, **{CACHE: cache}, use_cache=True
            ).last_hidden_state
            theirs = self.target.hf.lm_head(hidden)
        error = (ours.float() - theirs.float()).abs().max().item()
        layers = self.target.text.config.num_hidden_layers
        rounding = torch.finfo(ours.dtype).eps * theirs.float().abs().max().item()
        allowed = 4 * layers**0.5 * rounding
        if not error <= allowed:
            raise Wrong(f"logits: expected an error of at most {allowed:.3g}, got {error:.3g}")
        self.checks["logits"] = f"HF's, up to {error:.2g} ({allowed:.2g} allowed)"
