"""lvspec: loosely speculative decoding of Video-LLMs.

`generate` decodes with an HF target and an HF draft; `AcceptancePolicy` says what may be accepted,
`DecodeConfig` how to run; `lvspec.ops` has the operations for those who bring their own loop.
"""

from lvspec.config import DecodeConfig
from lvspec.generate import GenerationInterrupted, NonFiniteLogits, generate
from lvspec.policy import AcceptancePolicy
from lvspec.trace import Generation

__all__ = [
    "AcceptancePolicy",
    "DecodeConfig",
    "Generation",
    "GenerationInterrupted",
    "NonFiniteLogits",
    "generate",
]
