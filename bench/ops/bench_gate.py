"""gate: the threshold of each sequence from its rows."""

from ops import checks
from ops.case_inputs import gate_bytes, gate_inputs

from lvspec import ops


def test_gate(case, inputs_of, report):
    inputs = inputs_of(gate_inputs, case)

    def call():
        return ops.gate(*inputs)

    checks.check_gate(inputs, call())
    report(case, call, gate_bytes(case, inputs), {}, inputs)
