"""commit_kv: the K/V of accepted slots move to where the sequence continues."""

from __future__ import annotations

import torch


def commit_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    path: torch.Tensor,
    num_accepted: torch.Tensor,
) -> None:
    """Move row `kv_len + path[i]` to `kv_len + i` for `i = 0 .. num_accepted`, in place, in all
    layers.

    Source and destination overlap: everything is read before anything is written. Moves are
    bitwise. The caller adds `num_accepted + 1` to `kv_len` afterwards. An entry of -1 in
    `num_accepted` moves nothing. Positions outside the rows named above keep their bits.

    Worked example: `kv_len` = 2, `path` = [0, 2, 5, -1, -1, -1], `num_accepted` = 2. Rows 2, 4 and
    7 move to 2, 3 and 4::

        before  a b | r 1 2 3 4 5        after  a b | r 2 5 3 4 5

    Args:
        k_cache: any dtype `[L, B, Hkv, N, D]`, or `[B, Hkv, N, D]` for one layer; strided views
            allowed.
        v_cache: Like `k_cache`.
        kv_len: int32 `[B]`, committed tokens before this pass.
        path: int32 `[B, S]` from `accept`, padded with -1.
        num_accepted: int32 `[B]` from `accept`.
    """
    steps = zip(kv_len.tolist(), path.tolist(), num_accepted.tolist())
    for sequence, (length, slots, count) in enumerate(steps):
        chosen = slots[: count + 1]
        if chosen == list(range(len(chosen))):
            continue  # a chain: everything stands where it belongs
        source = torch.tensor(chosen, device=k_cache.device) + length
        for cache in (k_cache, v_cache):
            rows = cache.select(-4, sequence)
            rows[..., length : length + len(chosen), :] = rows.index_select(-2, source)
