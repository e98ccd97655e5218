"""Captions by the hundred thousand: decoded ahead, batched, written behind, resumed."""
