"""The operation `accept`."""

from lvspec.kernels.accept.walk import *  # noqa: F403
