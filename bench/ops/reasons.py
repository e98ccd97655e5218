"""Why there is no figure."""

from __future__ import annotations


class Wrong(AssertionError):
    """A result is not what it should be: it is not timed."""


class Unavailable(RuntimeError):
    """A peer cannot do this here."""


class DoesNotFit(RuntimeError):
    """The inputs of a case are larger than the device's free memory."""
