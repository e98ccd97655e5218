"""Tiles, warps and stages of `attend_kernel`, as `bench/sweep.py` chooses them."""

from __future__ import annotations

import triton

from lvspec.kernels import launch

# (device class, padded head dim, bytes of an element of the cache): BLOCK_N, and for every BLOCK_M
# that is used (num_warps, num_stages). One BLOCK_N for all BLOCK_M: pieces fold alike for all S.
LAUNCH: dict[tuple[str, int, int], tuple[int, dict[int, tuple[int, int]]]] = {
    ("sm80", 64, 1): (32, {16: (4, 2), 32: (4, 2), 64: (4, 2)}),
    ("sm80", 64, 2): (64, {16: (4, 3), 32: (4, 3), 64: (4, 3), 128: (8, 3)}),
    ("sm80", 128, 1): (64, {16: (4, 2), 32: (4, 2), 64: (8, 2)}),
    ("sm80", 128, 2): (32, {16: (4, 3), 32: (4, 3), 128: (8, 3)}),
    ("sm80", 256, 1): (32, {16: (4, 2), 32: (8, 2)}),
    ("sm80", 256, 2): (32, {16: (4, 2), 32: (8, 2)}),
    ("sm90", 64, 1): (64, {16: (4, 4), 32: (4, 4), 64: (4, 4), 128: (8, 4)}),
    ("sm90", 64, 2): (64, {16: (4, 4), 32: (4, 4), 64: (4, 4), 128: (8, 4)}),
    ("sm90", 128, 1): (64, {16: (4, 3), 32: (8, 3), 64: (4, 3), 128: (8, 3)}),
    # Of tiles with 64 rows two fit a multiprocessor, of one with 128 one: registers and stages.
    ("sm90", 128, 2): (64, {16: (4, 3), 32: (4, 3), 64: (4, 3)}),
    ("sm90", 256, 1): (32, {16: (4, 3), 32: (8, 3), 64: (8, 3)}),
    ("sm90", 256, 2): (32, {16: (4, 3), 32: (8, 3), 64: (8, 3)}),
}
for _head_dim in (64, 128, 256):
    for _size in (1, 2):
        LAUNCH["sm100", _head_dim, _size] = LAUNCH["sm90", _head_dim, _size]
# Four warps for 16 rows spill eight bytes: three stages with triton 3.7, two with 3.6.
LAUNCH["sm100", 128, 2] = (64, {16: (8, 3), 32: (4, 3), 64: (8, 3), 128: (8, 3)})
# float32 has no tensor cores that keep its precision: plain products, which need many registers.
for _device_class in launch.DEVICE_CLASSES:
    LAUNCH[_device_class, 64, 4] = (32, {16: (8, 2), 32: (8, 2)})
    LAUNCH[_device_class, 128, 4] = (32, {16: (8, 2), 32: (8, 2)})
    LAUNCH[_device_class, 256, 4] = (16, {16: (8, 2)})


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
