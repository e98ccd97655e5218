"""lvspec: loosely speculative decoding of Video-LLMs.

`load_pair` loads two HF checkpoints and `generate` decodes with them. `AcceptancePolicy` says what
may be accepted, `DecodeConfig` how to run. `lvspec.ops` has the operations for those who bring
their own loop.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvspec.config import DecodeConfig
    from lvspec.decoder import Decoder, GenerationInterrupted
    from lvspec.engine import NonFiniteLogits
    from lvspec.generate import generate, generate_many
    from lvspec.hf import custom_generate
    from lvspec.loading import Pair, load_pair
    from lvspec.policy import AcceptancePolicy
    from lvspec.quantization import quantize
    from lvspec.trace import Generation
    from lvspec.trees import AnchorTree, DynamicTree
    from lvspec.vocabulary import frequent_tokens

    __version__: str

# torch and transformers take seconds to import: `lvspec --help` does without them.
_HOMES = {
    "AcceptancePolicy": "policy",
    "AnchorTree": "trees",
    "DecodeConfig": "config",
    "Decoder": "decoder",
    "DynamicTree": "trees",
    "Generation": "trace",
    "GenerationInterrupted": "decoder",
    "NonFiniteLogits": "engine",
    "Pair": "loading",
    "custom_generate": "hf",
    "frequent_tokens": "vocabulary",
    "generate": "generate",
    "generate_many": "generate",
    "load_pair": "loading",
    "quantize": "quantization",
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
    "custom_generate",
    "frequent_tokens",
    "generate",
    "generate_many",
    "load_pair",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("lvspec.environment").version("lvspec") or "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'lvspec' has no attribute {name!r}")
    return getattr(import_module(f"lvspec.{_HOMES[name]}"), name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule lvspec.generate binds it here, over the function of that name.
        if name == "generate" and isinstance(value, ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
