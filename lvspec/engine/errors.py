"""How generating ends early; what was generated before is not lost."""

from __future__ import annotations

from typing import Any

from lvspec.engine.result import Generation


class NonFiniteLogits(RuntimeError):
    """The target's logits were NaN. `generation` holds what was generated before."""

    index = 0  # which of the requests

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message)
        self.generation = generation

    def __reduce__(self) -> tuple[type[NonFiniteLogits], tuple[str, Generation], dict[str, Any]]:
        return type(self), (str(self), self.generation), vars(self)


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C while generating. `generations` holds what was generated and not yet returned.

    Attributes:
        generations: In the order of the requests, those that had begun.
    """

    def __init__(self, generations: list[Generation]) -> None:
        count = sum(generation.tokens.shape[1] for generation in generations)
        super().__init__(f"interrupted after {count} tokens")
        self.generations = generations

    def __reduce__(self) -> tuple[type[GenerationInterrupted], tuple[list[Generation]]]:
        return type(self), (self.generations,)

    @property
    def generation(self) -> Generation:
        """The first of them; there is one whenever a single prompt was interrupted."""
        return self.generations[0]
