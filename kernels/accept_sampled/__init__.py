"""The operation `accept_sampled`."""

from lvspec.kernels.accept_sampled.rows import *  # noqa: F403
