"""logit_stats, the eight best of every row."""

from ops import checks, peers
from ops.case_inputs import logits_bytes, logits_of

from lvspec import ops

TOP_K = 8


def test_logit_stats(case, inputs_of, report):
    logits = inputs_of(logits_of, case)

    def call():
        return ops.logit_stats(logits, top_k=TOP_K)

    checks.check_logit_stats(logits, TOP_K, call())
    report(case, call, logits_bytes(case, logits, TOP_K), peers.LOGIT_STATS, logits, TOP_K)
