"""The operations of lvspec, checked and dispatched to a backend.

Each function checks what it is given (attributes only: nothing is read from a device), calls
`torch.ops.lvspec.<its name>` and returns a NamedTuple. Meaning, shapes and types are those of the
function of the same name in `lvspec.reference`, whose documentation is not repeated here. All raise
ValueError that names the argument, what was expected and what came, and none needs a gradient.

LVSPEC_BACKEND in the environment, read when this module is imported, forces a backend; see
`backends`.
"""

from lvspec.ops import scaled_linear  # noqa: F401 (importing defines it)
from lvspec.ops.accept import Rules, accept
from lvspec.ops.accept_sampled import accept_sampled
from lvspec.ops.append import append
from lvspec.ops.backends import Backend, active_backend, backends, float_dtypes, requested_backend
from lvspec.ops.commit_kv import commit_kv
from lvspec.ops.expand_tree import expand_tree
from lvspec.ops.gate import gate
from lvspec.ops.logit_stats import logit_stats
from lvspec.ops.model_parts import (
    linear_add_,
    norm_gated_linear,
    norm_linear,
    rms_norm,
    rotary_angles,
    rotate_and_write,
    silu_multiply,
)
from lvspec.ops.verify_attention import MAX_HEAD_DIM, verify_attention
from lvspec.ops.visual_importance import visual_importance
from lvspec.ops.workspace import workspace_size
from lvspec.reference import (
    Acceptance,
    Gate,
    LogitStats,
    SplitPlan,
    TreeLevel,
    VerifyAttention,
    piece_length,
    plan_splits,
)

__all__ = [
    "Acceptance",
    "Backend",
    "Gate",
    "LogitStats",
    "MAX_HEAD_DIM",
    "Rules",
    "SplitPlan",
    "TreeLevel",
    "VerifyAttention",
    "accept",
    "accept_sampled",
    "active_backend",
    "append",
    "backends",
    "commit_kv",
    "expand_tree",
    "float_dtypes",
    "gate",
    "linear_add_",
    "logit_stats",
    "norm_gated_linear",
    "norm_linear",
    "piece_length",
    "plan_splits",
    "requested_backend",
    "rms_norm",
    "rotary_angles",
    "rotate_and_write",
    "silu_multiply",
    "verify_attention",
    "visual_importance",
    "workspace_size",
]
