"""Phase 3, against the operations that it does without."""

import pytest
import torch

from lvspec import ops, tree
from lvspec.phases.accept import root_alone
from lvspec.policy import AcceptancePolicy

PRESETS = ["strict", "lvspec", "fly", "typical", "relaxed", "random_relaxation"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_a_root_alone_is_what_the_operation_makes_of_it(preset, bad):
    """Autoregression does without `ops.accept`, whatever its policy; also where logits are bad."""
    policy = AcceptancePolicy.preset(preset)
    logits = torch.randn(5, 1, 30)
    logits[1, 0, 7] = logits[2, 0] = logits[3].max() if bad is None else bad
    stats = ops.logit_stats(logits, top_k=policy.needed_top_k)
    tokens = torch.randint(0, 30, (5, 1))
    expected = ops.accept(
        logits,
        tokens,
        tree.chain_parents(1, batch_size=5),
        torch.ones(5, dtype=torch.int32),
        stats,
        torch.rand(5, 1),
        policy,
        regret_used=torch.rand(5),
    )
    found = root_alone(stats)
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
