"""verify_attention: attention of the draft slots over the cache, and how much of it falls on video.

Reads `kv_len + S` rows of K and V per KV head once (`4 D` bytes a row in bfloat16) and q; writes
out, lse, mass and peak. Between its two kernels 4 `(D + 2)` bytes a row and piece go through the
workspace and stay in L2 if the pieces are long against the rows (see `piece_length`).
Grid: attend (row tiles, pieces + 1, B * Hkv), merge (B * Hq * S). Specification:
lvspec.reference.verify_attention.

The cache is cut into pieces that lie where they lie whatever else is in the batch: those of the
split plan, or such of fixed length. One program folds one piece for the query heads of a KV head
and all slots, packed as rows of one tile. The draft slots are piece 0, the only one with a mask of
ancestors. Under a plan a piece is wholly video or wholly text, so mass and peak follow from the
maximum and sum that every piece has anyway; without one the video bytes are read in the loop.

Rows give the same bits for any B and S: pieces, BLOCK_N and the order of merging do not depend on
them, hidden slots add exact zeros, and BLOCK_M only says which rows share a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.workspace import MASKED_PIECE, num_masked_pieces

# In place of -inf for a maximum of nothing: differences stay finite, and exp2 of them is 0 or 1.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _fold_block(
    query,
    q_row,
    is_row,
    accumulator,
    running_max,
    running_sum,
    video_max,
    video_sum,
    k_head,
    v_head,
    pages,
    stride_table_page,
    visual_row,
    stride_visual_position,
    ancestor_bits,
    first,
    begin,
    stop,
    scale,
    stride_q_dim,
    stride_k_page,
    stride_k_row,
    stride_k_dim,
    stride_v_page,
    stride_v_row,
    stride_v_dim,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VIDEO_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
):
    """One block of keys, from position `first` on, folded into the running softmax."""
    position = first + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    inside = position < stop
    if PAGE_SIZE > 0:
        if MASKED:
            page = tl.load(
                pages + position // PAGE_SIZE * stride_table_page, mask=inside, other=0
            ).to(tl.int64)
        else:
            page = tl.load(pages + position // PAGE_SIZE * stride_table_page).to(tl.int64)
        row = (position % PAGE_SIZE).to(tl.int64)
        k_row = k_head + page * stride_k_page + row * stride_k_row
        v_row = v_head + page * stride_v_page + row * stride_v_row
    else:
        k_row = k_head + position.to(tl.int64) * stride_k_row
        v_row = v_head + position.to(tl.int64) * stride_v_row
    # What stands at `stop` or later may be NaN, and 0 * NaN is NaN: it is not loaded.
    v_pointer = v_row[:, None] + dim[None, :].to(tl.int64) * stride_v_dim
    if MASKED:
        values = tl.load(v_pointer, mask=inside[:, None] & (dim[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM == BLOCK_D:
        values = tl.load(v_pointer)
    else:
        values = tl.load(v_pointer, mask=dim[None, :] < HEAD_DIM, other=0.0)
    values = values.to(q_row.dtype.element_ty)

    if BLOCK_K == BLOCK_D:
        k_pointer = k_row[None, :] + dim[:, None].to(tl.int64) * stride_k_dim
        if MASKED:
            keys = tl.load(k_pointer, mask=inside[None, :] & (dim[:, None] < HEAD_DIM), other=0.0)
        elif HEAD_DIM == BLOCK_D:
            keys = tl.load(k_pointer)
        else:
            keys = tl.load(k_pointer, mask=dim[:, None] < HEAD_DIM, other=0.0)
        keys = keys.to(query.dtype)
        if DOT_IN_FLOAT32:
            logits = tl.dot(query.to(tl.float32), keys.to(tl.float32), input_precision="ieee")
        else:
            logits = tl.dot(query, keys, input_precision="ieee")
    else:
        # A product without tensor cores holds its rows in registers: they are read part by part.
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first_dim in tl.static_range(0, BLOCK_D, BLOCK_K):
            part = first_dim + tl.arange(0, BLOCK_K)
            q_part = tl.load(
                q_row[:, None] + part[None, :].to(tl.int64) * stride_q_dim,
                mask=is_row[:, None] & (part[None, :] < HEAD_DIM),
                other=0.0,
            )
            k_part = tl.load(
                k_row[None, :] + part[:, None].to(tl.int64) * stride_k_dim,
                mask=inside[None, :] & (part[:, None] < HEAD_DIM),
                other=0.0,
            )
            logits = tl.dot(q_part, k_part.to(q_part.dtype), logits, input_precision="ieee")
    logits = logits * scale
    if MASKED:
        slot = ((position - begin) & 63).to(tl.int64)
        seen = ((ancestor_bits[:, None] >> slot[None, :]) & 1) != 0
        logits = tl.where(seen & inside[None, :], logits, float("-inf"))

    new_max = tl.maximum(running_max, tl.max(logits, 1))
    weights = tl.math.exp2(logits - new_max[:, None])
    rescale = tl.math.exp2(running_max - new_max)
    running_sum = running_sum * rescale + tl.sum(weights, 1)
    if VIDEO_MASK:
        is_video = (
            tl.load(visual_row + position * stride_visual_position, mask=inside, other=0) != 0
        )
        video_sum = video_sum * rescale + tl.sum(tl.where(is_video[None, :], weights, 0.0), 1)
        on_video = tl.where(is_video[None, :], logits, float("-inf"))
        video_max = tl.maximum(video_max, tl.max(on_video, 1))
    accumulator = accumulator * rescale[:, None]
    weights = weights.to(values.dtype)
    if DOT_IN_FLOAT32:
        accumulator = tl.dot(
            weights.to(tl.float32), values.to(tl.float32), accumulator, input_precision="ieee"
        )
    else:
        accumulator = tl.dot(weights, values, accumulator, input_precision="ieee")
    return accumulator, new_max, running_sum, video_max, video_sum


# These change with every prompt: compiled code must not depend on them.
@triton.jit(do_not_specialize=["num_slots", "num_pieces", "capacity"])
def attend_kernel(
    q,
    k_cache,
    v_cache,
    kv_len,
    ancestors,
    visual,
    block_table,
    plan_start,
    plan_end,
    k_scale,
    v_scale,
    partial_out,
    partial_max,
    partial_sum,
    partial_video_max,
    partial_video_sum,
    scale,
    num_slots,
    num_pieces,
    capacity,
    stride_q_sequence,
    stride_q_head,
    stride_q_slot,
    stride_q_dim,
    stride_k_sequence,
    stride_k_head,
    stride_k_row,
    stride_k_dim,
    stride_v_sequence,
    stride_v_head,
    stride_v_row,
    stride_v_dim,
    stride_ancestors_sequence,
    stride_ancestors_slot,
    stride_visual_sequence,
    stride_visual_position,
    stride_table_sequence,
    stride_table_page,
    stride_plan_sequence,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: not paged
    PIECE: tl.constexpr,  # length of a piece, 0: read the plan
    VIDEO_MASK: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
    BLOCK_K: tl.constexpr,  # dimensions of a product of q and K at a time
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One piece of one sequence's cache for a tile of rows of one KV head."""
    tile = tl.program_id(0)
    piece = tl.program_id(1)
    sequence = (tl.program_id(2) // NUM_KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(2) % NUM_KV_HEADS).to(tl.int64)

    length = tl.minimum(tl.load(kv_len + sequence), capacity)
    if piece == 0:
        begin = length
        stop = tl.minimum(length + num_slots, capacity)
    elif PIECE > 0:
        begin = (piece - 1) * PIECE
        stop = tl.minimum(begin + PIECE, length)
    else:
        entry = sequence * stride_plan_sequence + piece - 1
        begin = tl.load(plan_start + entry)
        stop = tl.minimum(tl.load(plan_end + entry), length)
    if begin >= stop:
        return  # the merge does not look at it either

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < GROUP * num_slots
    slot = (row % num_slots).to(tl.int64)
    q_head = kv_head * GROUP + row // num_slots
    dim = tl.arange(0, BLOCK_D)
    q_row = q + sequence * stride_q_sequence + q_head * stride_q_head + slot * stride_q_slot
    query = q_row
    if BLOCK_K == BLOCK_D:
        query = tl.load(
            q_row[:, None] + dim[None, :].to(tl.int64) * stride_q_dim,
            mask=is_row[:, None] & (dim[None, :] < HEAD_DIM),
            other=0.0,
        )
    # All bits outside of the tree: every position of another piece is seen by every row.
    ancestor_bits = tl.full([BLOCK_M], -1, tl.int64)
    if piece == 0:
        entry = sequence * stride_ancestors_sequence + slot * stride_ancestors_slot
        ancestor_bits = tl.load(ancestors + entry, mask=is_row, other=0)

    # Natural logarithms are made in the end: exp2 is one instruction, exp two.
    scale = scale * 1.4426950408889634
    if K_SCALED:
        scale = scale * tl.load(k_scale + kv_head)
    k_head = k_cache + kv_head * stride_k_head
    v_head = v_cache + kv_head * stride_v_head
    if PAGE_SIZE == 0:
        k_head += sequence * stride_k_sequence
        v_head += sequence * stride_v_sequence
    pages = block_table + sequence * stride_table_sequence
    visual_row = visual + sequence * stride_visual_sequence

    running_max = tl.full([BLOCK_M], _LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    video_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    video_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full = begin
    if piece > 0:
        full = begin + (stop - begin) // BLOCK_N * BLOCK_N
    for first in tl.range(begin, full, BLOCK_N):
        accumulator, running_max, running_sum, video_max, video_sum = _fold_block(
            query,
            q_row,
            is_row,
            accumulator,
            running_max,
            running_sum,
            video_max,
            video_sum,
            k_head,
            v_head,
            pages,
            stride_table_page,
            visual_row,
            stride_visual_position,
            ancestor_bits,
            first,
            begin,
            stop,
            scale,
            stride_q_dim,
            stride_k_sequence,
            stride_k_row,
            stride_k_dim,
            stride_v_sequence,
            stride_v_row,
            stride_v_dim,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_K=BLOCK_K,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            PAGE_SIZE=PAGE_SIZE,
            VIDEO_MASK=VIDEO_MASK,
            MASKED=False,
            DOT_IN_FLOAT32=DOT_IN_FLOAT32,
        )
    # The rest of a piece, or the tree: too short to be worth overlapping loads.
    for first in tl.range(full, stop, BLOCK_N, num_stages=1):
        accumulator, running_max, running_sum, video_max, video_sum = _fold_block(
            query,
            q_row,
            is_row,
            accumulator,
            running_max,
            running_sum,
            video_max,
            video_sum,
            k_head,
            v_head,
            pages,
            stride_table_page,
            visual_row,
            stride_visual_position,
            ancestor_bits,
            first,
            begin,
            stop,
            scale,
            stride_q_dim,
            stride_k_sequence,
            stride_k_row,
            stride_k_dim,
            stride_v_sequence,
            stride_v_row,
            stride_v_dim,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_K=BLOCK_K,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            PAGE_SIZE=PAGE_SIZE,
            VIDEO_MASK=VIDEO_MASK,
            MASKED=True,
            DOT_IN_FLOAT32=DOT_IN_FLOAT32,
        )

    if V_SCALED:
        accumulator = accumulator * tl.load(v_scale + kv_head)
    first_row = (sequence * NUM_KV_HEADS + kv_head) * (GROUP * num_slots)
    entry = (first_row + row) * (num_pieces + 1) + piece
    tl.store(partial_max + entry, running_max, mask=is_row)
    tl.store(partial_sum + entry, running_sum, mask=is_row)
    if VIDEO_MASK:
        tl.store(partial_video_max + entry, video_max, mask=is_row)
        tl.store(partial_video_sum + entry, video_sum, mask=is_row)
    tl.store(
        partial_out + entry[:, None] * HEAD_DIM + dim[None, :],
        accumulator,
        mask=is_row[:, None] & (dim[None, :] < HEAD_DIM),
    )


@triton.jit(do_not_specialize=["rows_per_sequence", "num_pieces", "capacity"])
def merge_kernel(
    partial_out,
    partial_max,
    partial_sum,
    partial_video_max,
    partial_video_sum,
    kv_len,
    plan_start,
    plan_end,
    plan_kind,
    out,
    lse,
    visual_mass,
    visual_peak,
    rows_per_sequence,
    num_pieces,
    capacity,
    stride_plan_sequence,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The pieces of one row, added in order."""
    row = tl.program_id(0).to(tl.int64)
    sequence = row // rows_per_sequence
    length = tl.minimum(tl.load(kv_len + sequence), capacity)
    first_entry = row * (num_pieces + 1)
    dim = tl.arange(0, BLOCK_D)

    highest = tl.full([], _LOWEST, tl.float32)
    for first in tl.range(0, num_pieces + 1, BLOCK_P):
        piece = first + tl.arange(0, BLOCK_P)
        used, _ = _pieces(
            piece, sequence, length, num_pieces, capacity, plan_start, plan_end, plan_kind,
            stride_plan_sequence, PIECE, False,
        )  # fmt: skip
        maximum = tl.load(partial_max + first_entry + piece, mask=used, other=_LOWEST)
        highest = tl.maximum(highest, tl.max(maximum, 0))

    total = tl.zeros([], tl.float32)
    video_total = tl.zeros([], tl.float32)
    video_highest = tl.full([], float("-inf"), tl.float32)
    accumulator = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, num_pieces + 1, BLOCK_P):
        piece = first + tl.arange(0, BLOCK_P)
        used, is_video = _pieces(
            piece, sequence, length, num_pieces, capacity, plan_start, plan_end, plan_kind,
            stride_plan_sequence, PIECE, SCORES,
        )  # fmt: skip
        entry = first_entry + piece
        maximum = tl.load(partial_max + entry, mask=used, other=_LOWEST)
        share = tl.math.exp2(maximum - highest)
        weight = share * tl.load(partial_sum + entry, mask=used, other=0.0)
        total += tl.sum(weight, 0)
        if SCORES:
            if PIECE > 0:
                video_weight = share * tl.load(partial_video_sum + entry, mask=used, other=0.0)
                video_max = tl.load(partial_video_max + entry, mask=used, other=float("-inf"))
            else:
                video_weight = tl.where(is_video, weight, 0.0)
                video_max = tl.where(is_video, maximum, float("-inf"))
            video_total += tl.sum(video_weight, 0)
            video_highest = tl.maximum(video_highest, tl.max(video_max, 0))
        part = tl.load(
            partial_out + entry[:, None] * HEAD_DIM + dim[None, :],
            mask=used[:, None] & (dim[None, :] < HEAD_DIM),
            other=0.0,
        )
        accumulator += tl.sum(share[:, None] * part, 0)

    # A row that attends to nothing: total 0, and -inf, 0, 0 and 0 come out.
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    result = accumulator * inverse
    tl.store(out + row * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(lse + row, (highest + tl.math.log2(total)) * 0.6931471805599453)
    if SCORES:
        tl.store(visual_mass + row, video_total * inverse)
        tl.store(visual_peak + row, tl.math.exp2(video_highest - highest) * inverse)


@triton.jit
def _pieces(
    piece,
    sequence,
    length,
    num_pieces,
    capacity,
    plan_start,
    plan_end,
    plan_kind,
    stride_plan_sequence,
    PIECE: tl.constexpr,
    KINDS: tl.constexpr,
):
    """Which of the pieces attend_kernel has written, and which of them are video."""
    is_listed = (piece > 0) & (piece <= num_pieces)
    if PIECE > 0:
        start = (piece - 1) * PIECE
        end = start + PIECE
    else:
        entry = sequence * stride_plan_sequence + piece - 1
        start = tl.load(plan_start + entry, mask=is_listed, other=0)
        end = tl.load(plan_end + entry, mask=is_listed, other=0)
    is_tree = piece == 0
    start = tl.where(is_tree, length, start)
    end = tl.where(is_tree, capacity, tl.minimum(end, length))
    used = (is_listed | is_tree) & (start < end)
    is_video = used
    if KINDS and PIECE == 0:
        is_video = used & (tl.load(plan_kind + entry, mask=is_listed, other=0) == 1)
    return used, is_video


# (device class, padded head dim, bytes of an element of the cache): BLOCK_N, and for every BLOCK_M
# that is used (num_warps, num_stages). One BLOCK_N for all BLOCK_M, for bits must not depend on S.
LAUNCH: dict[tuple[str, int, int], tuple[int, dict[int, tuple[int, int]]]] = {
    ("sm80", 64, 1): (32, {16: (4, 2), 32: (4, 2), 64: (4, 2)}),
    ("sm80", 64, 2): (64, {16: (4, 3), 32: (4, 3), 64: (4, 3), 128: (8, 3)}),
    ("sm80", 128, 1): (64, {16: (4, 2), 32: (8, 2), 64: (8, 2)}),
    ("sm80", 128, 2): (32, {16: (4, 3), 32: (4, 3), 128: (8, 3)}),
    ("sm80", 256, 1): (32, {16: (4, 2), 32: (8, 2)}),
    ("sm80", 256, 2): (32, {16: (4, 2), 32: (8, 2)}),
    ("sm90", 64, 1): (64, {16: (4, 4), 32: (4, 4), 64: (4, 4), 128: (8, 4)}),
    ("sm90", 64, 2): (64, {16: (4, 4), 32: (4, 4), 64: (4, 4), 128: (8, 4)}),
    ("sm90", 128, 1): (64, {16: (4, 3), 32: (8, 3), 64: (4, 3), 128: (8, 3)}),
    ("sm90", 128, 2): (64, {16: (4, 3), 32: (4, 3), 64: (4, 3), 128: (8, 3)}),
    ("sm90", 256, 1): (32, {16: (4, 3), 32: (8, 3), 64: (8, 3)}),
    ("sm90", 256, 2): (32, {16: (4, 3), 32: (8, 3), 64: (8, 3)}),
}
for _head_dim in (64, 128, 256):
    for _size in (1, 2):
        LAUNCH["sm100", _head_dim, _size] = LAUNCH["sm90", _head_dim, _size]
LAUNCH["sm100", 128, 2] = (64, {16: (4, 3), 32: (4, 3), 64: (8, 3), 128: (8, 3)})
# float32 has no tensor cores that keep its precision: plain products, which need many registers.
for _device_class in launch.DEVICE_CLASSES:
    LAUNCH[_device_class, 64, 4] = (32, {16: (8, 2), 32: (8, 2)})
    LAUNCH[_device_class, 128, 4] = (32, {16: (8, 2), 32: (8, 2)})
    LAUNCH[_device_class, 256, 4] = (16, {16: (8, 2)})

_MERGED_AT_ONCE = 16
_MERGE_WARPS = 4


def launch_shape(device_class: str, head_dim: int, itemsize: int, rows: int) -> dict[str, int]:
    """Tiles, warps and stages for `rows` = GROUP * S rows of a KV head.

    Args:
        device_class: See `launch.device_class`.
        head_dim: D.
        itemsize: Bytes of an element of the cache; 4 also for float32 queries of another cache.
        rows: Query heads of a KV head times slots.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_n, by_tile = LAUNCH[device_class, max(64, block_d), itemsize]
    block_m = next((tile for tile in by_tile if tile >= rows), max(by_tile))
    num_warps, num_stages = by_tile[block_m]
    return {
        "BLOCK_D": block_d,
        "BLOCK_K": block_d if itemsize < 4 else min(block_d, 64 if block_d <= 128 else 32),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    visual: torch.Tensor,
    scale: float,
    block_table: torch.Tensor | None,
    plan_start: torch.Tensor | None,
    plan_end: torch.Tensor | None,
    plan_kind: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    scores: bool,
    workspace: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch both kernels; arguments as in the schema of `torch.ops.lvspec.verify_attention`."""
    batch_size, num_q_heads, num_slots, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    page_size = 0
    if block_table is not None:
        page_size = capacity
        capacity *= block_table.shape[1]
    is_planned = plan_start is not None
    num_pieces = plan_start.shape[1] if is_planned else num_masked_pieces(capacity)
    piece = 0 if is_planned else MASKED_PIECE
    video_mask = scores and not is_planned
    rows = num_q_heads * num_slots
    group = num_q_heads // num_kv_heads

    shape = q.shape[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, mass, peak = (
        torch.empty(size, dtype=torch.float32, device=q.device)
        for size in (shape, shape if scores else (0,), shape if scores else (0,))
    )
    statistic = ((batch_size * rows, num_pieces + 1), torch.float32)
    partials = launch.carve(
        workspace,
        q.device,
        ((batch_size * rows, num_pieces + 1, head_dim), torch.float32),
        *[statistic] * (4 if video_mask else 2),
    )
    partial_out, partial_max, partial_sum = partials[:3]
    partial_video_max, partial_video_sum = partials[3:] or (partial_max, partial_sum)
    # These are small: a copy of one that is strided costs less than a stride of every table.
    kv_len = kv_len.contiguous()
    plan = [kv_len if table is None else table.contiguous() for table in (plan_start, plan_end)]
    plan.append(kv_len if plan_kind is None else plan_kind.contiguous())
    table = kv_len if block_table is None else block_table
    shape_of_launch = launch_shape(
        launch.device_class(q.device),
        head_dim,
        4 if q.dtype == torch.float32 else k_cache.element_size(),
        group * num_slots,
    )
    with launch.device_guard(q):
        attend_kernel[
            (
                triton.cdiv(group * num_slots, shape_of_launch["BLOCK_M"]),
                num_pieces + 1,
                batch_size * num_kv_heads,
            )
        ](
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            kv_len=kv_len,
            ancestors=ancestors,
            visual=visual,
            block_table=table,
            plan_start=plan[0],
            plan_end=plan[1],
            k_scale=k_scale,
            v_scale=v_scale,
            partial_out=partial_out,
            partial_max=partial_max,
            partial_sum=partial_sum,
            partial_video_max=partial_video_max,
            partial_video_sum=partial_video_sum,
            scale=scale,
            num_slots=num_slots,
            num_pieces=num_pieces,
            capacity=capacity,
            stride_q_sequence=q.stride(0),
            stride_q_head=q.stride(1),
            stride_q_slot=q.stride(2),
            stride_q_dim=q.stride(3),
            stride_k_sequence=k_cache.stride(0),
            stride_k_head=k_cache.stride(1),
            stride_k_row=k_cache.stride(2),
            stride_k_dim=k_cache.stride(3),
            stride_v_sequence=v_cache.stride(0),
            stride_v_head=v_cache.stride(1),
            stride_v_row=v_cache.stride(2),
            stride_v_dim=v_cache.stride(3),
            stride_ancestors_sequence=ancestors.stride(0),
            stride_ancestors_slot=ancestors.stride(1),
            stride_visual_sequence=visual.stride(0),
            stride_visual_position=visual.stride(1),
            stride_table_sequence=table.stride(0),
            stride_table_page=table.stride(-1),
            stride_plan_sequence=plan[0].stride(0),
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            PIECE=piece,
            VIDEO_MASK=video_mask,
            K_SCALED=k_scale is not None,
            V_SCALED=v_scale is not None,
            DOT_IN_FLOAT32=launch.INTERPRETED and q.dtype == torch.bfloat16,
            **shape_of_launch,
        )
        merge_kernel[(batch_size * rows,)](
            partial_out=partial_out,
            partial_max=partial_max,
            partial_sum=partial_sum,
            partial_video_max=partial_video_max,
            partial_video_sum=partial_video_sum,
            kv_len=kv_len,
            plan_start=plan[0],
            plan_end=plan[1],
            plan_kind=plan[2],
            out=out,
            lse=lse,
            visual_mass=mass,
            visual_peak=peak,
            rows_per_sequence=rows,
            num_pieces=num_pieces,
            capacity=capacity,
            stride_plan_sequence=plan[0].stride(0),
            HEAD_DIM=head_dim,
            BLOCK_D=shape_of_launch["BLOCK_D"],
            PIECE=piece,
            SCORES=scores,
            BLOCK_P=_MERGED_AT_ONCE,
            num_warps=_MERGE_WARPS,
            num_stages=1,
        )
    return out, lse, mass, peak
