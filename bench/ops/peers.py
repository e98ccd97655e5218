"""What our operations are measured against: the same work done with what people have today.

A peer is a function `(case, inputs) -> call`; what need not be done in every step, such as building
a mask, it does before it returns. `Unavailable` says why there is none. The ideas are those of the
named projects, the code is ours.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from ops.case_inputs import (
    EXPAND_WIDTH,
    AcceptInputs,
    CommitInputs,
    ExpandInputs,
    ImportanceInputs,
    SampledInputs,
    VerifyInputs,
)
from ops.cases import COMPILED, Case, kv_lengths, parents_of
from ops.linear_cases import LinearCase, LinearInputs
from ops.reasons import Unavailable
from torch import Tensor

from lvspec import tree

Call = Callable[[], Any]
Peer = Callable[..., Call]


def repeat_kv(cache: Tensor, group: int) -> Tensor:
    """KV heads as often as query heads use them, in memory, as transformers does it."""
    return cache.repeat_interleave(group, dim=1) if group > 1 else cache


def dense_mask(inputs: VerifyInputs) -> Tensor:
    """bool `[B, 1, S, T]`: what each slot attends to; T is the longest kv_len and S."""
    q, _, _, kv_len, ancestors = inputs[:5]
    num_slots = q.shape[2]
    position = torch.arange(int(kv_len.max()) + num_slots, device=q.device)
    slot = (position - kv_len[:, None])[:, None]  # [B, 1, T]
    on_tree = (slot >= 0) & (slot < num_slots)
    bit = (ancestors[:, :, None] >> slot.clamp(0, 63)) & 1
    return ((slot < 0) | (on_tree & (bit == 1)))[:, None]


def eager_logits(inputs: VerifyInputs, mask: Tensor | None = None) -> Tensor:
    """Scores `[B, Hq, S, T]` in the inputs' dtype, -inf where a slot does not attend."""
    mask = dense_mask(inputs) if mask is None else mask
    q, k_cache = inputs[:2]
    keys = repeat_kv(k_cache[:, :, : mask.shape[-1]], q.shape[1] // k_cache.shape[1])
    logits = torch.matmul(q, keys.transpose(2, 3)) * q.shape[-1] ** -0.5
    return logits.masked_fill(~mask, -math.inf)


def eager_attention(
    inputs: VerifyInputs, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, visual_mass, visual_peak) from all the weights, as with `output_attentions=True`."""
    q, k_cache, v_cache, _, _, visual, _ = inputs
    weights = F.softmax(eager_logits(inputs, mask), dim=-1, dtype=torch.float32).to(q.dtype)
    length = weights.shape[-1]
    values = repeat_kv(v_cache[:, :, :length], q.shape[1] // k_cache.shape[1])
    on_video = weights * (visual[:, None, None, :length] != 0)
    return torch.matmul(weights, values), on_video.sum(-1), on_video.amax(-1)


def eager(case: Case, inputs: VerifyInputs) -> Call:
    mask = dense_mask(inputs)
    return lambda: eager_attention(inputs, mask)


def sdpa(case: Case, inputs: VerifyInputs) -> Call:
    """As transformers calls it where there is a mask: heads repeated. No scores."""
    mask, group = dense_mask(inputs), case.shape.group

    def call() -> Tensor:
        keys, values = (repeat_kv(x[:, :, : mask.shape[-1]], group) for x in inputs[1:3])
        return F.scaled_dot_product_attention(inputs.q, keys, values, attn_mask=mask)

    return call


def sdpa_grouped(case: Case, inputs: VerifyInputs) -> Call:
    """PyTorch's own grouping of heads. No scores."""
    mask = dense_mask(inputs)
    keys, values = (x[:, :, : mask.shape[-1]] for x in inputs[1:3])
    return lambda: F.scaled_dot_product_attention(
        inputs.q, keys, values, attn_mask=mask, enable_gqa=True
    )


def flex_attention(case: Case, inputs: VerifyInputs) -> Call:
    """FlexAttention with the tree in its mask, compiled. No scores; the mask is not timed."""
    _check_compiled(case, inputs.q)
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attention

    q, _, _, kv_len, ancestors = inputs[:5]
    length = max(kv_lengths(case)) + case.num_slots

    def attends(b: Tensor, h: Tensor, row: Tensor, position: Tensor) -> Tensor:
        slot = position - kv_len[b]
        bit = (ancestors[b, row] >> slot.clamp(0, 63)) & 1
        return (slot < 0) | ((slot < case.num_slots) & (bit == 1))

    mask = create_block_mask(attends, case.batch_size, None, case.num_slots, length, q.device)
    keys, values = (x[:, :, :length].contiguous() for x in inputs[1:3])
    compiled = torch.compile(attention, dynamic=False)
    enable_gqa = case.shape.group > 1
    return lambda: compiled(q, keys, values, block_mask=mask, enable_gqa=enable_gqa)


def flash_attn(case: Case, inputs: VerifyInputs) -> Call:
    """FlashAttention over its KV cache. Chains only, no scores."""
    module = _module("flash_attn")
    if case.is_tree:
        raise Unavailable("no tree masks")
    q = inputs.q.transpose(1, 2)
    keys, values = (x.transpose(1, 2) for x in inputs[1:3])
    lengths = inputs.kv_len + case.num_slots
    return lambda: module.flash_attn_with_kvcache(
        q, keys, values, cache_seqlens=lengths, causal=True
    )


def flashinfer(case: Case, inputs: VerifyInputs) -> Call:
    """FlashInfer's prefill of one sequence with a custom mask. No scores."""
    module = _module("flashinfer")
    if case.batch_size > 1:
        raise Unavailable("measured for one sequence only")
    mask = dense_mask(inputs)[0, 0].contiguous()
    q = inputs.q[0].transpose(0, 1).contiguous()
    keys, values = (x[0, :, : mask.shape[-1]] for x in inputs[1:3])
    return lambda: module.single_prefill_with_kv_cache(
        q, keys, values, custom_mask=mask, kv_layout="HND"
    )


def _check_compiled(case: Case, tensor: Tensor) -> None:
    if tensor.device.type != "cuda":
        raise Unavailable("compiled for CUDA only")
    if case not in COMPILED:
        raise Unavailable("compiled for two cases only")
    torch.compiler.reset()  # there is a limit to how many shapes a function is compiled for


@functools.cache
def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a build for another torch raises anything
        raise Unavailable(f"{type(error).__name__}: {error}") from None


def torch_statistics(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """topk, logsumexp and entropy as three operations in float32."""
    values = logits.float()
    best, ids = values.topk(top_k, dim=-1)
    lse = values.logsumexp(-1)
    log_probs = values.log_softmax(-1)
    return ids, best, lse, -(log_probs.exp() * log_probs).sum(-1)


def torch_logit_stats(case: Case, logits: Tensor, top_k: int) -> Call:
    return lambda: torch_statistics(logits, top_k)


def compiled_logit_stats(case: Case, logits: Tensor, top_k: int) -> Call:
    """The same, fused by torch.compile where it can."""
    _check_compiled(case, logits)
    compiled = torch.compile(torch_statistics, dynamic=False)
    return lambda: compiled(logits, top_k)


def specvlm_accept(case: Case, inputs: AcceptInputs) -> Call:
    """Greedy acceptance as in SpecVLM: all paths side by side, a cumulative product of matches.

    Returns the number accepted and the best path of every sequence, left on the device.
    """
    device = inputs.tokens.device
    paths = tree.paths(parents_of(case)).to(device).long()  # [leaves, depth + 1]
    is_slot, rows = paths >= 0, paths.clamp(min=0)

    def call() -> tuple[Tensor, Tensor]:
        wanted = inputs.stats.top_ids[..., 0][:, rows[:, :-1]]
        matches = (inputs.tokens[:, rows[:, 1:]] == wanted) & is_slot[:, 1:]
        length = matches.int().cumprod(-1).sum(-1)  # [B, leaves]
        accepted, leaf = length.max(-1)
        return accepted, paths[leaf]

    return call


def fly_accept(case: Case, inputs: AcceptInputs, window: int = 5, gate: float = 0.3) -> Call:
    """Loose acceptance as in FLy: a mismatch passes where the entropy of the row's three best
    tokens reaches the gate and `window` matches follow. Chains only."""
    if case.is_tree:
        raise Unavailable("chains only")
    if case.num_slots == 1:
        raise Unavailable("nothing drafted")

    def call() -> Tensor:
        stats = inputs.stats
        match = inputs.tokens[:, 1:] == stats.top_ids[:, :-1, 0]
        log_probs = stats.top_logits[:, :-1, :3] - stats.lse[:, :-1, None]
        undecided = -(log_probs.exp() * log_probs).sum(-1) >= gate
        # Matches among the next `window`; what is behind the draft is none.
        behind = F.pad(match.float(), (0, window))[:, 1:].unfold(1, window, 1).sum(-1)
        stands = match | (undecided & (behind[:, : match.shape[1]] == window))
        return stands.int().cumprod(-1).sum(-1)

    return call


def torch_sampled(case: Case, inputs: SampledInputs) -> Call:
    """Speculative sampling as in transformers: two softmaxes, a ratio, a multinomial draw."""
    sequence = torch.arange(case.batch_size, device=inputs.tokens.device)
    drafted = inputs.tokens[:, 1:, None]

    def call() -> tuple[Tensor, Tensor]:
        target = inputs.logits.float().softmax(-1)
        draft = inputs.draft_logits.float().softmax(-1)
        ratio = target[:, :-1].gather(-1, drafted) / draft.gather(-1, drafted)
        accepted = (inputs.uniforms[:, 1:] < ratio[..., 0]).int().cumprod(-1).sum(-1)
        row = target[sequence, accepted]
        if case.num_slots == 1:
            return accepted, row.multinomial(1)
        rejected = draft[sequence, accepted.clamp(max=case.num_slots - 2)]
        is_rejected = (accepted < case.num_slots - 1)[:, None]
        weights = torch.where(is_rejected, (row - rejected).clamp(min=0), row)
        return accepted, weights.multinomial(1)

    return call


def index_copy(case: Case, inputs: CommitInputs) -> Call:
    """Rows selected and copied sequence by sequence, all layers at once, as SpecVLM does it.

    How many there are is known to the host, which in a real step costs a synchronisation.
    """
    length = kv_lengths(case)
    slots = inputs.path.tolist()
    counts = inputs.num_accepted.tolist()
    device = inputs.k_cache.device
    moves = [
        (
            sequence,
            length[sequence] + torch.tensor(slots[sequence][: count + 1], device=device),
            length[sequence] + torch.arange(count + 1, device=device),
        )
        for sequence, count in enumerate(counts)
    ]

    def call() -> None:
        for sequence, source, target in moves:
            for cache in inputs[:2]:
                rows = cache.select(-4, sequence)
                rows.index_copy_(-2, target, rows.index_select(-2, source))

    return call


def eager_importance(inputs: ImportanceInputs) -> Tensor:
    """From all the weights of the rows over the committed positions."""
    q, k_cache, kv_len, visual, _ = inputs
    length = int(kv_len.max())
    keys = repeat_kv(k_cache[:, :, :length], q.shape[1] // k_cache.shape[1])
    committed = torch.arange(length, device=q.device) < kv_len[:, None]
    return _importance(q, keys, committed[:, None, None], visual[:, None, None, :length] != 0)


def _importance(q: Tensor, keys: Tensor, committed: Tensor, is_video: Tensor) -> Tensor:
    logits = torch.matmul(q, keys.transpose(2, 3)) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~committed, -math.inf)
    weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights * is_video).sum((1, 2))


def weights_importance(case: Case, inputs: ImportanceInputs) -> Call:
    """Weights materialised, as with `output_attentions=True`, then summed."""
    q, k_cache, kv_len, visual, _ = inputs
    length, group = max(kv_lengths(case)), case.shape.group
    committed = (torch.arange(length, device=q.device) < kv_len[:, None])[:, None, None]
    is_video = visual[:, None, None, :length] != 0
    return lambda: _importance(q, repeat_kv(k_cache[:, :, :length], group), committed, is_video)


def torch_expand(case: Case, inputs: ExpandInputs) -> Call:
    """log_softmax, topk of every node, topk of all children."""
    top_k = min(EXPAND_WIDTH, case.shape.vocabulary)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        best, ids = inputs.logits.float().log_softmax(-1).topk(top_k, dim=-1)
        scores, order = (best + inputs.log_probs[..., None]).flatten(1).topk(EXPAND_WIDTH, dim=-1)
        return ids.flatten(1).gather(1, order), inputs.slots.gather(1, order // top_k), scores

    return call


def expanded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that quantised ones stand for."""
    return (weight.to(torch.float32) * scale[:, None]).to(dtype)


def expanded_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """A product with expanded weights."""
    return F.linear(x, expanded(weight, scale, x.dtype))


def plain_linear(case: LinearCase, inputs: LinearInputs) -> Call:
    """The layer before it was quantised, with weights in the dtype of x."""
    weight = expanded(inputs.weight, inputs.scale, inputs.x.dtype)
    return lambda: F.linear(inputs.x, weight)


def torchao_linear(case: LinearCase, inputs: LinearInputs) -> Call:
    """torchao's own product, not compiled."""
    torchao = _module("torchao.quantization")
    configs = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}
    layer = torch.nn.Linear(case.size, case.outputs, bias=False, device="meta")
    weight = expanded(inputs.weight, inputs.scale, inputs.x.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    torchao.quantize_(layer, configs[case.weights](set_inductor_config=False))
    return lambda: layer(inputs.x)


ATTENTION: dict[str, Peer] = {
    "eager, weights": eager,
    "sdpa": sdpa,
    "sdpa grouped": sdpa_grouped,
    "flex_attention": flex_attention,
    "flash-attn": flash_attn,
    "flashinfer": flashinfer,
}
LOGIT_STATS: dict[str, Peer] = {"torch": torch_logit_stats, "torch.compile": compiled_logit_stats}
ACCEPT: dict[str, Peer] = {"specvlm": specvlm_accept, "fly": fly_accept}
SAMPLED: dict[str, Peer] = {"torch": torch_sampled}
COMMIT: dict[str, Peer] = {"index_copy": index_copy}
IMPORTANCE: dict[str, Peer] = {"eager, weights": weights_importance}
EXPAND: dict[str, Peer] = {"torch": torch_expand}
COMPILED_PEERS = (flex_attention, compiled_logit_stats)
"""Those that torch.compile makes: seconds for every size."""
LINEAR: dict[str, Peer] = {"not quantised": plain_linear, "torchao": torchao_linear}
