"""visual_importance of the rows behind the video; S of a case is the number of rows."""

from ops import checks, peers
from ops.case_inputs import importance_bytes, importance_inputs

from lvspec import ops


def test_visual_importance(case, inputs_of, report):
    inputs = inputs_of(importance_inputs, case)

    def call():
        return ops.visual_importance(*inputs)

    checks.check_visual_importance(inputs, call())
    report(case, call, importance_bytes(case, inputs), peers.IMPORTANCE, inputs)
