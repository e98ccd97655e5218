"""lvspec: loosely speculative decoding of Video-LLMs.

`load_pair` loads two HF checkpoints and `generate` decodes with them. `AcceptancePolicy` says what
may be accepted, `DecodeConfig` how to run. `lvspec.ops` has the operations for those who bring
their own loop.
"""

from lvspec.config import DecodeConfig
from lvspec.generate import GenerationInterrupted, NonFiniteLogits, generate
from lvspec.loading import Pair, load_pair
from lvspec.policy import AcceptancePolicy
from lvspec.trace import Generation

__all__ = [
    "AcceptancePolicy",
    "DecodeConfig",
    "Generation",
    "GenerationInterrupted",
    "NonFiniteLogits",
    "Pair",
    "generate",
    "load_pair",
]
