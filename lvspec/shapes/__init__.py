"""The embedded pair: synthetic clips of moving shapes, and a target and a draft that caption them."""
