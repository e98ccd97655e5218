"""lvspec: loosely speculative decoding of Video-LLMs.

`load_pair` loads two HF checkpoints and `generate` decodes with them. `AcceptancePolicy` says what
may be accepted, `DecodeConfig` how to run. `lvspec.ops` has the operations for those who bring
their own loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvspec.calibration.calibrate import calibrate
    from lvspec.captioning.api import caption
    from lvspec.config import DecodeConfig
    from lvspec.engine.api import generate, generate_many
    from lvspec.engine.decoder import Decoder
    from lvspec.engine.errors import GenerationInterrupted, NonFiniteLogits
    from lvspec.engine.hf import custom_generate
    from lvspec.engine.result import Generation
    from lvspec.evaluation.evaluate import evaluate
    from lvspec.models.loading import Pair, load_pair
    from lvspec.models.quantize import quantize
    from lvspec.models.release import release
    from lvspec.phases.draft.vocabulary import frequent_tokens
    from lvspec.policy import AcceptancePolicy
    from lvspec.profile import Profile
    from lvspec.reporting.report import report
    from lvspec.tree_shapes import AnchorTree, DynamicTree, SkipTree

    __version__: str

# torch and transformers take seconds to import: `lvspec --help` does without them.
_HOMES = {
    "AcceptancePolicy": "policy",
    "AnchorTree": "tree_shapes",
    "DecodeConfig": "config",
    "Decoder": "engine.decoder",
    "DynamicTree": "tree_shapes",
    "Generation": "engine.result",
    "GenerationInterrupted": "engine.errors",
    "NonFiniteLogits": "engine.errors",
    "Pair": "models.loading",
    "Profile": "profile",
    "SkipTree": "tree_shapes",
    "calibrate": "calibration.calibrate",
    "caption": "captioning.api",
    "custom_generate": "engine.hf",
    "evaluate": "evaluation.evaluate",
    "frequent_tokens": "phases.draft.vocabulary",
    "generate": "engine.api",
    "generate_many": "engine.api",
    "load_pair": "models.loading",
    "quantize": "models.quantize",
    "release": "models.release",
    "report": "reporting.report",
}
__all__ = [
    "__version__",
    "AcceptancePolicy",
    "AnchorTree",
    "DecodeConfig",
    "Decoder",
    "DynamicTree",
    "Generation",
    "GenerationInterrupted",
    "NonFiniteLogits",
    "Pair",
    "Profile",
    "SkipTree",
    "calibrate",
    "caption",
    "custom_generate",
    "evaluate",
    "frequent_tokens",
    "generate",
    "generate_many",
    "load_pair",
    "quantize",
    "release",
    "report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("lvspec.environment").version("lvspec") or "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'lvspec' has no attribute {name!r}")
    return getattr(import_module(f"lvspec.{_HOMES[name]}"), name)
