"""The operations of lvspec, checked and dispatched to a backend."""

from lvspec.ops.verify_attention import *  # noqa: F403
from lvspec.ops.verify_attention import __all__ as __all__
