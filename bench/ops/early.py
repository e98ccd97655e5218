"""Early launches of a pass's kernels (`kernels/launch.py`): off until a device has timed them."""

from __future__ import annotations


def launch_early(is_early: bool) -> None:
    """From now on kernels that can be are launched, and compiled, so or not so.

    Raises:
        ModuleNotFoundError: There is no triton.
    """
    from lvspec.kernels import launch  # only where it is asked for: it imports triton

    launch.DEPENDENT = is_early
