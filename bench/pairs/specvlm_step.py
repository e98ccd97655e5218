"""A step of speculative decoding as research code runs it: SpecVLM's way, in our own words.

Batch 1, a static tree of 26 slots, strict acceptance. HF's eager attention gets a dense float mask
of all slots by all positions, so it repeats keys and values for every query head and makes all
scores; a DynamicCache is a new, longer copy in every layer of every pass, and an index_select keeps
the rows that were accepted. Where a level stands, which path is taken and whether it ends are read
from the device: nine reads an iteration (SpecVLM's own code has about eleven).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache

from lvspec.models.hf_names import CACHE
from lvspec.models.model import Model
from lvspec.tree_shapes import NAMED_TREES, StaticTree

TREE = StaticTree.of(NAMED_TREES["specvlm"])


class SpecVLMStep:
    """A sequence under way: a target, a draft, and their caches.

    Args:
        target, draft: Models; positions count the tokens.
        target_cache, draft_cache: Hold what is committed but for the root. Both are changed.
        root: int64 `[1, 1]`, the last committed token.

    Attributes:
        output: The tokens added so far.
    """

    def __init__(
        self,
        target: Model,
        draft: Model,
        target_cache: DynamicCache,
        draft_cache: DynamicCache,
        root: Tensor,
    ) -> None:
        self.target, self.draft = target, draft
        self.target_cache, self.draft_cache = target_cache, draft_cache
        self.root = self.committed = root
        self.output: list[int] = []
        self.is_finished, self.eos_id = False, -1  # random weights have no end
        self.shared_vocab = min(target.vocab_size, draft.vocab_size)
        device, slots = root.device, len(TREE.parents)
        sees = torch.eye(slots, dtype=torch.bool)
        for slot, parent in enumerate(TREE.parents):
            if parent >= 0:
                sees[slot] |= sees[parent]
        self.sees = sees.to(device)
        self.depths = torch.tensor(TREE.depths, device=device)
        self.levels = [
            [slot for slot, depth in enumerate(TREE.depths) if depth == level]
            for level in range(max(TREE.depths) + 1)
        ]
        leaves = [slot for slot in range(slots) if slot not in TREE.parents]
        paths = torch.full((len(leaves), len(self.levels)), -1)
        for row, leaf in zip(paths, leaves):
            slot = leaf
            while slot >= 0:
                row[TREE.depths[slot]] = slot
                slot = TREE.parents[slot]
        self.paths = paths.to(device)

    @contextmanager
    def attention(self) -> Iterator[None]:
        """`run` is called within this context: both text models are set to eager attention."""
        models = (self.target.text, self.draft.text)
        before = [model.config._attn_implementation for model in models]
        for model in models:
            model.set_attn_implementation("eager")
        try:
            yield
        finally:
            for model, name in zip(models, before):
                model.set_attn_implementation(name)

    def run(self) -> Tensor:
        """One iteration: int64 `[n]`, the tokens it adds."""
        tokens = self._drafted()
        logits = self._pass(self.target, self.target_cache, tokens, self.sees, self.depths)
        return self._accepted(tokens, logits)

    def _drafted(self) -> Tensor:
        """int64 `[1, 26]`: level by level, each from the rows above it."""
        length = self.target_cache.get_seq_length()
        behind = self.draft_cache.get_seq_length()
        missing = self.committed[:, self.committed.shape[1] - 1 - (length - behind) :]
        count = missing.shape[1]
        chain = torch.ones(count, count, dtype=torch.bool, device=self.root.device).tril()
        depths = torch.arange(count, device=self.root.device)
        rows = self._pass(self.draft, self.draft_cache, missing, chain, depths)[:, -1:]
        tokens = self.root
        for above, level in zip(self.levels, self.levels[1:]):
            if above[0] > 0:
                # The root is in the cache by now, so the columns begin with the slot behind it.
                sees = self.sees[above[0] : above[-1] + 1, 1 : above[-1] + 1]
                start = length + int(self.depths[above[0]])
                depths = torch.zeros(len(above), dtype=torch.int64, device=tokens.device)
                passed = tokens[:, above[0] :]
                rows = self._pass(self.draft, self.draft_cache, passed, sees, depths, start)
            ranks = max(TREE.ranks[slot] for slot in level) + 1
            best = rows[..., : self.shared_vocab].topk(ranks, dim=-1).indices
            choices = [best[:, TREE.parents[i] - above[0], TREE.ranks[i]] for i in level]
            tokens = torch.cat([tokens, torch.stack(choices, dim=1)], dim=1)
        # What the draft thought of the tree is forgotten, but for the root.
        self.draft_cache.crop(length + 1 - self.draft_cache.get_seq_length())
        return tokens

    def _pass(
        self,
        model: Model,
        cache: DynamicCache,
        tokens: Tensor,
        sees: Tensor,
        depths: Tensor,
        start: int | None = None,
    ) -> Tensor:
        """Logits `[1, S, V]`; `sees` is bool `[S, n]` over the last n positions."""
        length = cache.get_seq_length()
        slots = tokens.shape[1]
        start = length if start is None else start
        lowest = torch.finfo(model.text.dtype).min
        mask = torch.zeros(
            1, 1, slots, length + slots, dtype=model.text.dtype, device=tokens.device
        )
        mask[..., length + slots - sees.shape[1] :].masked_fill_(~sees, lowest)
        positions = (start + depths)[None]
        if model.family.position_rows > 1:
            positions = positions.expand(model.family.position_rows, 1, -1)
        hidden = model.text(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            **{CACHE: cache},
            use_cache=True,
        ).last_hidden_state
        return model.hf.lm_head(hidden)

    def _accepted(self, tokens: Tensor, logits: Tensor) -> Tensor:
        wanted = logits[0].argmax(-1)
        drafted = torch.cat([tokens[0], tokens.new_full((1,), -1)])[self.paths]
        matches = drafted[:, 1:] == wanted[self.paths[:, :-1].clamp(min=0)]
        lengths = (matches & (self.paths[:, 1:] >= 0)).int().cumprod(1).sum(1)
        accepted = int(lengths.max())
        path = self.paths[int(lengths.argmax()), : accepted + 1]
        last = int(path[-1])
        length = self.target_cache.get_seq_length() - len(TREE.parents)
        for layer in self.target_cache.layers:
            kept = length + path
            for name in ("keys", "values"):
                rows = getattr(layer, name)
                moved = rows.index_select(2, kept)
                setattr(layer, name, torch.cat([rows[:, :, :length], moved], dim=2))
        added = torch.cat([tokens[0, path[1:]], wanted[last : last + 1]])
        self.root = added[None, -1:]
        self.committed = torch.cat([self.committed, added[None]], dim=1)
        self.is_finished = bool((added == self.eos_id).any())
        self.output += added.tolist()
        return added
