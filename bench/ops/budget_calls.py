"""The calls whose launches `bench/budget.py` compiles: every entry of every launch table.

Tensors have no data and, but for what decides the code, no particular size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lvspec.kernels import verify_attention
from lvspec.rule import GATE_BINS, Rule

CAPABILITY = {"sm80": 80, "sm90": 90, "sm100": 100}

Made = tuple[tuple[Any, ...] | None, int]  # arguments of a launcher, and the chip to compile for
Call = tuple[str, str, Callable[[str], Made]]  # operation, label, arguments by device class


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _int32(*shape: int) -> torch.Tensor:
    return _empty(*shape, dtype=torch.int32)


def attention(
    dtype: torch.dtype,
    head_dim: int,
    rows: int,
    *,
    planned: bool = True,
    scores: bool = True,
    paged: bool = False,
    fp8: bool = False,
) -> Callable[[str], Made]:
    """A launch with a tile of `rows` rows, if the device class has one."""

    def make(device_class: str) -> Made:
        # Data-centre Ampere cannot convert from float8; its table serves chips that can.
        capability = 89 if fp8 and device_class == "sm80" else CAPABILITY[device_class]
        padded = max(64, 1 << (head_dim - 1).bit_length())
        itemsize = 1 if fp8 else dtype.itemsize
        if rows not in verify_attention.LAUNCH[device_class, padded, itemsize][1]:
            return None, capability
        heads, capacity, pieces = 2, 16896, 36
        stored = torch.float8_e4m3fn if fp8 else dtype
        shape = (99, heads, 64, head_dim) if paged else (1, heads, capacity, head_dim)
        cache = _empty(*shape, dtype=stored)
        factors = _empty(heads) if fp8 else None
        plan = (_int32(1, pieces),) * 3 if planned else (None, None, None)
        return (
            _empty(1, heads, rows, head_dim, dtype=dtype),
            cache,
            cache,
            _int32(1),
            _empty(1, rows, dtype=torch.int64),
            _empty(1, capacity, dtype=torch.uint8),
            0.125,
            _int32(1, capacity // 64) if paged else None,
            *plan,
            factors,
            factors,
            scores,
            None,
        ), capability

    return make


def _attention_calls() -> list[Call]:
    calls: list[Call] = []

    def add(dtype: torch.dtype, head_dim: int, rows: int, **flags: bool) -> None:
        words = [str(dtype).removeprefix("torch."), f"D={head_dim}", f"rows={rows}"]
        words += [name if value else f"no-{name}" for name, value in flags.items()]
        words += ["few-rows"] if rows < 64 else []
        calls.append(
            ("verify_attention", " ".join(words), attention(dtype, head_dim, rows, **flags))
        )

    for rows in (16, 32, 64, 128):
        for head_dim in (64, 128, 256):
            add(torch.bfloat16, head_dim, rows)
            add(torch.bfloat16, head_dim, rows, fp8=True)
            add(torch.float32, head_dim, rows)
        add(torch.bfloat16, 128, rows, planned=False)
        add(torch.bfloat16, 128, rows, paged=True)
    for rows in (16, 128):
        for head_dim in (80, 96):
            add(torch.bfloat16, head_dim, rows)
        add(torch.float16, 128, rows)
        add(torch.bfloat16, 128, rows, scores=False)
        add(torch.bfloat16, 128, rows, planned=False, scores=False)
        add(torch.bfloat16, 128, rows, fp8=True, paged=True)
        add(torch.bfloat16, 128, rows, planned=False, paged=True)
    return calls


def _call(operation: str, label: str, *arguments: Any) -> Call:
    return operation, label, lambda device_class: (arguments, CAPABILITY[device_class])


def _logits(dtype: torch.dtype, rows: int) -> torch.Tensor:
    return _empty(1, rows, 152064, dtype=dtype)


def _acceptance_calls() -> list[Call]:
    calls: list[Call] = []
    slots, kept = 17, 5
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        logits = _logits(dtype, slots)
        calls.append(_call("logit_stats", name, logits, kept, None))
        nodes = (_empty(1, slots), _int32(1, slots))
        calls.append(_call("expand_tree", name, logits, *nodes, 16, 4, None))
    calls.append(_call("logit_stats", "bfloat16 K=16", _logits(torch.bfloat16, slots), 16, None))
    for slots in (9, 17, 64):
        logits = _logits(torch.bfloat16, slots)
        tokens = _empty(1, slots, dtype=torch.int64)
        statistics = (_int32(1, slots, kept), _empty(1, slots, kept), *[_empty(1, slots)] * 2)
        strict, eos = _empty(1, 2, dtype=torch.int64), _empty(2, dtype=torch.int64)
        draft = (logits, tokens, _int32(1, slots), _int32(1), *statistics)
        scores, rule = _empty(1, slots), _empty(1, len(Rule._fields))
        label = f"bfloat16 S={slots}"
        calls.append(_call("accept", label, *draft, scores, _empty(1), strict, eos, rule))
        gated = (scores, _int32(1), rule, _int32(1, GATE_BINS))
        calls.append(_call("gate", f"S={slots}", *gated))
    logits = _logits(torch.bfloat16, 17)
    draft = (_empty(1, 17, dtype=torch.int64), _int32(1), _empty(1, 17))
    for label, draft_logits in (("draft-logits", logits[:, :-1]), ("no-draft-logits", None)):
        calls.append(
            _call("accept_sampled", f"bfloat16 {label}", logits, draft_logits, *draft, 1.0, None)
        )
    return calls


def _cache_calls() -> list[Call]:
    calls: list[Call] = []
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        cache = _empty(36, 1, 8, 4608, 128, dtype=dtype)
        for slots in (17, 64):
            path = (_int32(1), _int32(1, slots), _int32(1))
            calls.append(_call("commit_kv", f"{name} S={slots}", cache, cache, *path))
    for dtype, head_dim in (
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float32, 128),
        (torch.float32, 256),
    ):
        name = str(dtype).removeprefix("torch.")
        for rows in (1, 4, 32):  # tiles of 16, 32 and 64 rows at most
            q = _empty(1, 40, rows, head_dim, dtype=dtype)
            cache = _empty(1, 8, 32, head_dim, dtype=dtype)
            scored = (_int32(1), _empty(1, 32, dtype=torch.uint8), _empty(1, 40, rows), 0.125)
            calls.append(
                _call("visual_importance", f"{name} D={head_dim} R={rows}", q, cache, *scored)
            )
    return calls


def _loop_calls() -> list[Call]:
    """What commit does to a few numbers, with and without relevance."""
    calls: list[Call] = []
    for slots in (1, 13, 64):
        out, ids = (1, 256 + slots), _empty(1, dtype=torch.int64)
        relevance = _empty(1, slots)
        state = (
            _empty(*out, dtype=torch.int64),
            _empty(*out, dtype=torch.uint8),
            _empty(*out),
            _int32(1),
            _int32(),
            _empty(1, 2, dtype=torch.int64),
            _empty(1),
            _empty(1, dtype=torch.bool),
            _empty(2, dtype=torch.int64),
            _int32(1),
        )
        drafted = (_empty(1, slots, dtype=torch.int64), _int32(1))
        accepted = (_int32(1, slots), _int32(1), ids, _empty(1, slots, dtype=torch.uint8))
        rest = (*accepted, _empty(1), relevance)
        calls.append(_call("append", f"S={slots}", *state, *drafted, *rest, relevance, 6, 3, -1))
    return calls


def _model_part_calls() -> list[Call]:
    """Sizes of Qwen2.5-VL 3B, 7B and 72B, and of LLaVA-OneVision 0.5B; heads of 64, 80 and 128."""
    calls: list[Call] = []
    rows = 13
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for hidden in (896, 2048, 3584, 8192):
            x, weight = _empty(1, rows, hidden, dtype=dtype), _empty(hidden, dtype=dtype)
            calls.append(_call("rms_norm", f"{name} H={hidden}", x, weight, 1e-6))
        head = _empty(1, rows, 16, 128, dtype=dtype)  # Qwen3-VL norms heads
        calls.append(_call("rms_norm", f"{name} D=128", head, _empty(128, dtype=dtype), 1e-6))
        gate = _empty(1, rows, 18944, dtype=dtype)
        calls.append(_call("silu_multiply", name, gate, gate))
        positions = _empty(3, 1, rows, dtype=torch.int64)
        tables = (_empty(64), _int32(64))
        calls.append(_call("rotary_angles", name, positions, *tables, 1.0, dtype))
        for head_dim in (64, 80, 128):
            qkv = _empty(1, rows, 36 * head_dim, dtype=dtype)
            angles = (_empty(1, rows, head_dim, dtype=dtype),) * 2
            cache = _empty(28, 1, 4, 4608, head_dim, dtype=dtype)
            norm = _empty(head_dim, dtype=dtype)
            for label, norms in (("", (None, None)), (" norms", (norm, norm))):
                given = (qkv, *angles, *norms, 1e-6, cache, cache, 1, _int32(1))
                calls.append(_call("rotate_and_write", f"{name} D={head_dim}{label}", *given))
    return calls


def _product_calls() -> list[Call]:
    """Layers of 3B and 7B, with the rows of a chain's steps and of its check."""
    calls: list[Call] = []

    def add(operation: str, dtype: torch.dtype, rows: int, outputs: int, size: int) -> None:
        name = str(dtype).removeprefix("torch.")
        x, weight = _empty(rows, size, dtype=dtype), _empty(outputs, size, dtype=dtype)
        normed = (x, _empty(size, dtype=dtype), 1e-6, weight)
        arguments = {
            "norm_linear": (*normed, _empty(outputs, dtype=dtype)),
            "norm_gated_linear": normed,
            "linear_add_": (x, weight, _empty(rows, outputs, dtype=dtype)),
        }[operation]
        label = f"{name} N={outputs} K={size} M={rows} few-rows"
        calls.append(_call(operation, label, *arguments))

    for rows in (1, 8, 13):
        for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 3 if rows == 1 else 1]:
            add("norm_linear", dtype, rows, 2560, 2048)
            add("norm_gated_linear", dtype, rows, 22016, 2048)
            add("linear_add_", dtype, rows, 2048, 11008)
        add("norm_linear", torch.bfloat16, rows, 4608, 3584)
        add("linear_add_", torch.bfloat16, rows, 8192, 8192)
    return calls


def _linear(rows: int, outputs: int, size: int, x: torch.dtype, stored: torch.dtype) -> Call:
    def make(device_class: str) -> Made:
        is_fp8 = stored == torch.float8_e4m3fn
        capability = 89 if is_fp8 and device_class == "sm80" else CAPABILITY[device_class]
        weight, scale = _empty(outputs, size, dtype=stored), _empty(outputs)
        bias = _empty(outputs, dtype=x)
        return (_empty(1, rows, size, dtype=x), weight, scale, bias), capability

    names = [str(dtype).removeprefix("torch.") for dtype in (x, stored)]
    label = f"{names[0]} {names[1]} N={outputs} K={size} M={rows} few-rows"
    return "scaled_linear", label, make


def _linear_calls() -> list[Call]:
    """Layers and heads of drafts of 3B and 0.5B, with the rows of chains and of trees."""
    calls: list[Call] = []
    sizes = [(2048, 2048), (11008, 2048), (2048, 11008), (151936, 2048)]
    sizes += [(896, 896), (4864, 896)]
    for stored in (torch.int8, torch.float8_e4m3fn):
        calls += [_linear(1, *size, torch.bfloat16, stored) for size in sizes]
        for rows in (16, 64):
            calls += [_linear(rows, *size, torch.bfloat16, stored) for size in sizes[:2]]
        for rows in (1, 64):
            calls.append(_linear(rows, *sizes[1], torch.float16, stored))
        calls.append(_linear(1, *sizes[1], torch.float32, stored))
    return calls


CALLS: list[Call] = [
    *_attention_calls(),
    *_acceptance_calls(),
    *_cache_calls(),
    *_model_part_calls(),
    *_product_calls(),
    *_linear_calls(),
    *_loop_calls(),
]
