"""accept under three policies; the statistics are given, as they are to its peers."""

import pytest
from ops import checks, peers
from ops.case_inputs import POLICIES, accept_bytes, accept_inputs

from lvspec import ops

COMPARABLE = {"strict": ("specvlm",), "fly": ("fly",), "lvspec": ()}


@pytest.mark.parametrize("policy", POLICIES)
def test_accept(case, inputs_of, report, policy):
    inputs = inputs_of(accept_inputs, case)

    def call():
        return ops.accept(*inputs, POLICIES[policy])

    checks.check_accept(inputs, POLICIES[policy], call())
    others = {name: peers.ACCEPT[name] for name in COMPARABLE[policy]}
    report(case, call, accept_bytes(case, inputs), others, inputs, policy=policy)
