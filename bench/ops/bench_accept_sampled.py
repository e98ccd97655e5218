"""accept_sampled, temperature 1, with the draft's distributions."""

from ops import checks, peers
from ops.case_inputs import sampled_bytes, sampled_inputs

from lvspec import ops


def test_accept_sampled(case, inputs_of, report):
    inputs = inputs_of(sampled_inputs, case)

    def call():
        return ops.accept_sampled(*inputs)

    checks.check_accept_sampled(inputs, call())
    report(case, call, sampled_bytes(case, inputs), peers.SAMPLED, inputs)
