"""Every way of drafting, for tests of what must hold for all of them."""

from typing import Any

from lvspec import AnchorTree, DynamicTree, SkipTree

WAYS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "autoregression": (None, {}),
    "chain": ("model", {}),
    "part of the video": ("model", {"draft_keep": 0.5}),
    "static tree": ("model", {"tree": "specvlm"}),
    "dynamic tree": ("model", {"tree": DynamicTree(3, 3)}),
    "anchor tree": ("model", {"tree": AnchorTree(2, 3)}),
    "skip tree": ("model", {"tree": SkipTree(3, 7)}),
    "anchor stop": ("model", {"stop_at_unsure_anchors": 0.7}),
    "n-grams for the draft": ("model", {"draft_ngram": 2, "draft_passes": 3}),
    "float8 caches": ("model", {"cache_dtype": "fp8", "tree": "specvlm"}),
    "self": ("self", {"draft_keep": 0.5}),
    "n-grams": ("ngram", {}),
    "sampling": ("model", {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 1}),
    "sampling, tree": ("model", {"temperature": 0.8, "seed": 1, "tree": "specvlm"}),
    "few tokens": ("model", {"draft_vocab": range(5, 99)}),
    "few tokens, tree": ("model", {"draft_vocab": range(5, 99), "tree": DynamicTree(3, 3)}),
    "few tokens, sampling": ("model", {"draft_vocab": range(5, 99), "temperature": 0.8, "seed": 1}),
}
"""Of each way the draft (a model, "self", "ngram" or nobody) and its fields of `DecodeConfig`."""
