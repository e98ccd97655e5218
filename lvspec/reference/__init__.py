"""Every operation of lvspec in plain PyTorch: the specification of all other backends.

Written for reading. Float64 input gives float64 results, so the same code is the oracle for
rounding errors. On CUDA tensors everything here works too, but the lengths, paths and tokens are
read back to the host: it is neither fast nor capturable there.
"""

from lvspec.reference.accept import Acceptance, accept
from lvspec.reference.accept_sampled import accept_sampled
from lvspec.reference.commit_kv import commit_kv
from lvspec.reference.expand_tree import TreeLevel, expand_tree
from lvspec.reference.gate import Gate, gate
from lvspec.reference.logit_stats import LogitStats, logit_stats
from lvspec.reference.model_parts import (
    linear_add_,
    norm_gated_linear,
    norm_linear,
    rms_norm,
    rotary_angles,
    rotate_and_write,
    silu_multiply,
)
from lvspec.reference.scaled_linear import scaled_linear
from lvspec.reference.split_plan import SplitPlan, piece_length, plan_splits
from lvspec.reference.verify_attention import VerifyAttention, verify_attention
from lvspec.reference.visual_importance import visual_importance

__all__ = [
    "Acceptance",
    "Gate",
    "LogitStats",
    "SplitPlan",
    "TreeLevel",
    "VerifyAttention",
    "accept",
    "accept_sampled",
    "commit_kv",
    "expand_tree",
    "gate",
    "linear_add_",
    "logit_stats",
    "norm_gated_linear",
    "norm_linear",
    "piece_length",
    "plan_splits",
    "rms_norm",
    "rotary_angles",
    "rotate_and_write",
    "scaled_linear",
    "silu_multiply",
    "verify_attention",
    "visual_importance",
]
