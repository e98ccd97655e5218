"""One piece of the cache, or the tree, folded into a running softmax for a tile of rows."""

from __future__ import annotations

import triton
import triton.language as tl

# In place of -inf for a maximum of nothing: differences stay finite, and exp2 of them is 0 or 1.
LOWEST = tl.constexpr(-3.0e38)


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
    if K_SCALED:
        scale = scale * tl.load(k_scale + tl.program_id(2))
    if piece == 0:
        begin = length
        stop = tl.minimum(length + num_slots, capacity)
    elif PIECE > 0:
        begin = (piece - 1) * PIECE
        stop = tl.minimum(begin + PIECE, length)
    else:
        offset = sequence * stride_plan_sequence + piece - 1
        begin = tl.load(plan_start + offset)
        stop = tl.minimum(tl.load(plan_end + offset), length)
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
        offset = sequence * stride_ancestors_sequence + slot * stride_ancestors_slot
        ancestor_bits = tl.load(ancestors + offset, mask=is_row, other=0)

    # Natural logarithms are made in the end: exp2 is one instruction, exp two.
    scale = scale * 1.4426950408889634
    k_head = k_cache + kv_head * stride_k_head
    v_head = v_cache + kv_head * stride_v_head
    if PAGE_SIZE == 0:
        k_head += sequence * stride_k_sequence
        v_head += sequence * stride_v_sequence
    pages = block_table + sequence * stride_table_sequence
    visual_row = visual + sequence * stride_visual_sequence

    running_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    video_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    video_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full = begin
    if piece > 0:
        full = begin + (stop - begin) // BLOCK_N * BLOCK_N
    # Whole blocks; then the rest of a piece, or the tree, too short to be worth overlapping loads.
    for part in tl.static_range(2):
        first_of_part = begin if part == 0 else full
        end_of_part = full if part == 0 else stop
        for first in tl.range(
            first_of_part, end_of_part, BLOCK_N, num_stages=None if part == 0 else 1
        ):
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
                MASKED=part == 1,
                DOT_IN_FLOAT32=DOT_IN_FLOAT32,
            )

    first_row = (sequence * NUM_KV_HEADS + kv_head) * (GROUP * num_slots)
    offset = (first_row + row) * (num_pieces + 1) + piece
    tl.store(partial_max + offset, running_max, mask=is_row)
    tl.store(partial_sum + offset, running_sum, mask=is_row)
    if VIDEO_MASK:
        tl.store(partial_video_max + offset, video_max, mask=is_row)
        tl.store(partial_video_sum + offset, video_sum, mask=is_row)
    tl.store(
        partial_out + offset[:, None] * HEAD_DIM + dim[None, :],
        accumulator,
        mask=is_row[:, None] & (dim[None, :] < HEAD_DIM),
    )
