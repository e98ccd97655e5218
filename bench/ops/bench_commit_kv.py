"""commit_kv, all layers of K and V: the deepest path of a tree, or a chain, where nothing moves."""

from ops import checks, peers
from ops.case_inputs import commit_bytes, commit_inputs, committed_rows

from lvspec import ops


def test_commit_kv(case, inputs_of, report):
    inputs = inputs_of(commit_inputs, case)
    before = [rows.clone() for rows in committed_rows(case, inputs)]

    def call():
        ops.commit_kv(*inputs)

    call()
    checks.check_commit_kv(inputs, before, committed_rows(case, inputs))
    report(case, call, commit_bytes(case, inputs), peers.COMMIT, inputs)
