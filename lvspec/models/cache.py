"""SlotCache: preallocated keys and values of B sequences, as a transformers Cache.

Rows are written in place and never moved by the cache itself. `kv_len` says how many are committed;
rows behind it are scratch, so taking back a draft is a smaller `kv_len` and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PretrainedConfig

from lvspec import ops
from lvspec.ops.float8 import write_float8
from lvspec.reference.float8 import FLOAT8, float8_scale, narrow_to_float8

HEADROOM = 2.0
"""How much larger than the prompt's largest key or value a later one may be in a float8 cache; what
is larger still becomes the largest. As the type is a float, room above costs hardly anything."""


class Beginning(NamedTuple):
    """The tokens with which two prompts begin, all that replace pixels among them.

    Attributes:
        place: Of the other prompt, which was read before.
        length: Tokens; fewer than either prompt has.
    """

    place: int
    length: int


class SlotCache(Cache):
    """Keys, values, positions and the video mask of `batch_size` sequences.

    A pass has at most `num_slots` slots. `heads` are those of queries and of keys that this process
    has; None: all of the model's.

    Attributes:
        k, v: `[L, B, Hkv, N, D]`, the model's dtype or float8_e4m3fn. Zero at first: a row that no
            pass wrote must not bring NaN into a masked product.
        k_scale, v_scale: float32 `[L, B, Hkv]`, what the numbers of a sequence's head are
            multiplied by, powers of two that its prompt decides (so that nothing depends on the
            other sequences); None where keys and values are of the model's dtype.
        kv_len: int32 `[B]`, committed positions.
        no_rows: int32 `[B]`, zeros: the `kv_len` of an empty cache.
        visual: uint8 `[B, N]`, 1 where the position holds a video token.
        positions: int64 `[R, B, N]`, the rotary position of every cache position, those behind the
            prompt included: time, height and width, or one row.
        plan: Where split-KV kernels cut the cache, at fixed addresses; None where the backend does
            not split, or where a prompt has so many short runs of video that a mask is the better
            way.
        workspace: uint8, scratch of the operations; None where the backend needs none.
    """

    def __init__(
        self,
        text_config: PretrainedConfig,
        *,
        batch_size: int,
        capacity: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        position_rows: int = 3,
        heads: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(layers=[])
        head_dim = head_dim_of(text_config)
        if heads is None:
            heads = text_config.num_attention_heads, text_config.num_key_value_heads
        num_q_heads, kv_heads = heads
        shape = (text_config.num_hidden_layers, batch_size, kv_heads, capacity, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.k_scale = self.v_scale = None
        if dtype == FLOAT8:
            self.k_scale, self.v_scale = torch.ones((2, *shape[:3]), device=device).unbind()
        self.kv_len, self.no_rows = torch.zeros(2, batch_size, dtype=torch.int32, device=device)
        self.visual = torch.zeros(batch_size, capacity, dtype=torch.uint8, device=device)
        positions = (position_rows, batch_size, capacity)
        self.positions = torch.zeros(positions, dtype=torch.int64, device=device)
        self.plan: ops.SplitPlan | None = None
        self.workspace: Tensor | None = None
        self._tables: ops.SplitPlan | None = None
        self._without_plan: set[int] = set()
        self._prompt_len = [0] * batch_size
        self._num_written = 0
        self._written: Tensor | None = None
        self._sizes = (num_slots, num_q_heads, text_config.vocab_size)
        self._make_workspace()

    def _make_workspace(self) -> None:
        if ops.active_backend(self.k.device.type) != "triton":
            return
        num_slots, num_q_heads, vocabulary = self._sizes
        _, batch_size, kv_heads, capacity, head_dim = self.k.shape
        size = ops.workspace_size(
            batch_size=batch_size,
            num_slots=num_slots,
            num_q_heads=num_q_heads,
            head_dim=head_dim,
            capacity=capacity,
            vocabulary=vocabulary,
            num_pieces=most_pieces(capacity, kv_heads),
        )
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.k.device)

    @classmethod
    def over(
        cls, k: Tensor, v: Tensor, kv_len: Tensor, visual: Tensor, positions: Tensor
    ) -> SlotCache:
        """A cache of these very tensors, for one pass over them."""
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=[])
        cache.k, cache.v = k, v
        cache.kv_len, cache.visual, cache.positions = kv_len, visual, positions
        cache.plan = cache.workspace = cache._written = None
        cache.k_scale = cache.v_scale = None
        return cache

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `over` takes."""
        return self.k, self.v, self.kv_len, self.visual, self.positions

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions, at new addresses; nothing to do if there is."""
        more = capacity - self.capacity
        if more <= 0:
            return
        self.k, self.v = (
            pad(_selectable(x), (0, 0, 0, more)).view(x.dtype) for x in (self.k, self.v)
        )
        self.visual = pad(self.visual, (0, more))
        following = self.positions[..., -1:] + torch.arange(1, more + 1, device=self.k.device)
        self.positions = torch.cat([self.positions, following], dim=-1)
        self._make_workspace()
        self._tables = None
        for sequence, length in enumerate(self._prompt_len):
            if length:
                self._plan(sequence)

    def begin_step(self, num_slots: int) -> None:
        """The next forward writes `num_slots` rows per sequence, from `kv_len` on."""
        self._num_written, self._written = num_slots, None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Write a step's rows of one layer; all of the layer's cache is returned (no copy)."""
        if self.k_scale is not None:
            device = self.k.device
            self.write(layer_idx, key_states.to(device), value_states.to(device))
            return self.k[layer_idx], self.v[layer_idx]
        if self._written is None:  # where attention writes them itself, nobody needs to know
            offsets = torch.arange(self._num_written, device=self.kv_len.device)
            rows = (self.kv_len[:, None] + offsets)[:, None, :, None]
            _, batch_size, kv_heads, _, head_dim = self.k.shape
            self._written = rows.expand(batch_size, kv_heads, self._num_written, head_dim)
        keys, values = self.k[layer_idx], self.v[layer_idx]
        # A layer of a model over several devices may be on another than the cache.
        keys.scatter_(2, self._written, key_states.to(keys.device))
        values.scatter_(2, self._written, value_states.to(values.device))
        return keys, values

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """A step's rows `[B, Hkv, S, D]` of one layer into a float8 cache, behind `kv_len`."""
        scales = (self.k_scale, self.v_scale)
        write_float8(keys, values, *scales, self.k, self.v, layer, self.kv_len)

    def write_prompt(self, layer: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        """A whole prompt's rows `[Hkv, T, D]` of one layer into its place in a float8 cache."""
        length = keys.shape[1]
        for stored, rows, scale in (
            (self.k, keys, self.k_scale),
            (self.v, values, self.v_scale),
        ):
            found = float8_scale(rows, (1, 2), HEADROOM)
            scale[layer, sequence] = found
            stored[layer, sequence, :, :length] = narrow_to_float8(rows, found[:, None, None])

    def scales(self, places: slice = slice(None)) -> tuple[Tensor, Tensor] | None:
        """(keys', values') factors of some places, `[L, n, Hkv]`; None without."""
        if self.k_scale is None:
            return None
        return self.k_scale[:, places], self.v_scale[:, places]

    def prefill_view(self, sequence: int, begun: int = 0) -> PrefillView:
        """A cache for HF's own prefill forward of one sequence, which fills its place.

        Args:
            sequence: The place.
            begun: Rows that are there already: the forward is over what follows.
        """
        return PrefillView(self, sequence, begun)

    def begin_as(self, sequence: int, beginning: Beginning) -> None:
        """Copy the rows of what another place has read of this prompt already.

        (Not those of a float8 cache: a prompt is read with its keys and values as they were.)
        """
        for rows in (self.k, self.v):
            copied = rows[:, beginning.place, :, : beginning.length]
            rows[:, sequence, :, : beginning.length] = copied

    def finish_prefill(self, sequence: int, positions: Tensor, visual: Tensor) -> None:
        """Take a prompt for prefilled.

        Args:
            sequence: Its place.
            positions: int64 `[R, T]`, rotary positions of the prompt.
            visual: bool or uint8 `[T]`.

        Positions behind the prompt go on one by one from its last, in every row, as they do in HF's
        greedy decoding.
        """
        length = positions.shape[1]
        following = torch.arange(1, self.capacity - length + 1, device=positions.device)
        self.positions[:, sequence, :length] = positions
        self.positions[:, sequence, length:] = positions[:, -1:] + following
        self.visual[sequence].zero_()
        self.visual[sequence, :length] = visual.to(torch.uint8)
        self.kv_len[sequence] = length
        self._prompt_len[sequence] = length
        self._plan(sequence)

    def keep(self, sequence: int, rows: Tensor, source: SlotCache | None = None) -> None:
        """Make some rows of a prefilled prompt all that its place holds of it.

        Each keeps its keys, values, rotary position and video mark; positions behind the prompt go
        on as before.

        Args:
            sequence: Its place, in both caches.
            rows: int64 `[n]`, rows of the prompt, ascending; its last one is among them.
            source: The cache that the prompt was read into; None is this one.
        """
        source = self if source is None else source
        count = rows.shape[0]
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            # A copy comes between, so rows may move within one cache.
            found = _selectable(theirs[:, sequence]).index_select(2, rows)
            mine[:, sequence, :, :count] = found.view(theirs.dtype)
        if self.k_scale is not None:
            self.k_scale[:, sequence] = source.k_scale[:, sequence]
            self.v_scale[:, sequence] = source.v_scale[:, sequence]
        positions = source.positions[:, sequence].index_select(1, rows)
        visual = source.visual[sequence].index_select(0, rows)
        self.finish_prefill(sequence, positions, visual)

    def reading_view(self, sequence: int) -> ReadingView:
        """A cache for one more pass over rows of a sequence that are there already."""
        return ReadingView(self, sequence)

    def _plan(self, sequence: int) -> None:
        """Cut a prompt into pieces, in a table whose shape and address stay."""
        if ops.active_backend(self.k.device.type) != "triton":
            return
        _, batch_size, kv_heads, capacity, _ = self.k.shape
        width = most_pieces(capacity, kv_heads)
        if self._tables is None:
            table = torch.zeros(3, batch_size, width, dtype=torch.int32, device=self.k.device)
            self._tables = ops.SplitPlan(*table)
            self._tables.kind.fill_(-1)  # padding
        visual, length = self.visual[sequence : sequence + 1].cpu(), self._prompt_len[sequence]
        try:
            plan = ops.plan_splits(
                visual, torch.tensor([length]), num_kv_heads=kv_heads, num_pieces=width
            )
        except ValueError:  # more pieces than that
            self._without_plan.add(sequence)
        else:
            self._without_plan.discard(sequence)
            for table, row in zip(self._tables, plan, strict=True):
                table[sequence] = row[0].to(table.device)
        self.plan = None if self._without_plan else self._tables


def head_dim_of(text_config: PretrainedConfig) -> int:
    """Numbers in a head."""
    heads = text_config.num_attention_heads
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // heads


def _selectable(x: Tensor) -> Tensor:
    """Its bytes, if it is float8: of that some operations are missing here and there."""
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x


def most_pieces(capacity: int, num_kv_heads: int) -> int:
    """Pieces of a plan that is worth following: twice those of a prompt that is one run."""
    return 2 * -(-capacity // ops.piece_length(capacity, num_kv_heads)) + 16


class PrefillView(Cache):
    """What HF's forward sees while it fills one place: a cache that keeps what it gets.

    It is empty, but for the rows that the place has already.
    """

    def __init__(self, cache: SlotCache, sequence: int, begun: int) -> None:
        super().__init__(layers=[])
        self._cache = cache
        self._sequence, self._begun = sequence, begun

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._begun

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._begun + query_length, 0

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        place, begin = self._sequence, self._begun
        end = begin + key_states.shape[2]
        if self._cache.k_scale is not None:  # all of the prompt, which sees it as it is
            self._cache.write_prompt(layer_idx, place, key_states[0], value_states[0])
            return key_states, value_states
        keys, values = self._cache.k[layer_idx], self._cache.v[layer_idx]
        keys[place, :, begin:end] = key_states[0]
        values[place, :, begin:end] = value_states[0]
        if begin == 0:
            return key_states, value_states
        # A layer of a model over several devices may be on another than the cache.
        return (
            keys[place : place + 1, :, :end].to(key_states.device),
            values[place : place + 1, :, :end].to(value_states.device),
        )


class ReadingView(Cache):
    """What a pass over rows that are there already sees: one place, to which nothing is written."""

    def __init__(self, cache: SlotCache, sequence: int) -> None:
        super().__init__(layers=[])
        self._cache = cache
        self._place = slice(sequence, sequence + 1)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        return self._cache.k[layer_idx, self._place], self._cache.v[layer_idx, self._place]
