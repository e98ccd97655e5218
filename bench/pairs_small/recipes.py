"""The small pairs by name."""

from pairs_small import unsure, wide

RECIPES = {"unsure": unsure.PAIR, "wide": wide.PAIR}
