"""What kind a token on an accepted path is, and in the output: the one place that says it."""

EXACT, LOOSE, SHIFT, BONUS = range(4)
"""The target's own choice; accepted though it is not; right, but elsewhere; added by the target."""

NO_KIND = 255
"""Of what is not on a path."""

KIND_NAMES = ("exact", "loose", "shift", "bonus")
"""By kind."""
