"""expand_tree: the eight best children of one level; S of a case is the number of nodes."""

from ops import checks, peers
from ops.case_inputs import expand_bytes, expand_inputs

from lvspec import ops


def test_expand_tree(case, inputs_of, report):
    inputs = inputs_of(expand_inputs, case)
    width, top_k = checks.expand_width(inputs)

    def call():
        return ops.expand_tree(*inputs, width=width, top_k=top_k)

    checks.check_expand_tree(inputs, top_k, call())
    report(case, call, expand_bytes(case, inputs), peers.EXPAND, inputs)
