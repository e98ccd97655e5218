"""scaled_linear: the layers of a quantised draft, a byte a weight."""

import torch
from ops import checks, peers
from ops.linear_cases import linear_bytes, linear_inputs


def test_scaled_linear(case, inputs_of, report):
    inputs = inputs_of(linear_inputs, case)

    def call():
        return torch.ops.lvspec.scaled_linear(*inputs)

    checks.check_scaled_linear(inputs, call())
    report(case, call, linear_bytes(case, inputs), peers.LINEAR, inputs)
