"""The operation `verify_attention`."""

from lvspec.kernels.verify_attention.attend import *  # noqa: F403
