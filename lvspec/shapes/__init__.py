"""The embedded pair: clips of moving shapes, and a target and a draft that caption them."""
