"""verify_attention with the pieces of a split plan, scores included."""

import functools

from ops import checks, peers
from ops.case_inputs import verify_bytes, verify_inputs

from lvspec import ops


def test_verify_attention(case, inputs_of, report, max_piece):
    inputs = inputs_of(functools.partial(verify_inputs, max_piece=max_piece), case)

    def call():
        return ops.verify_attention(*inputs[:6], plan=inputs.plan)

    checks.check_verify_attention(inputs, call())
    size = verify_bytes(case, inputs)
    report(case, call, size, peers.ATTENTION, inputs, max_piece=max_piece)
