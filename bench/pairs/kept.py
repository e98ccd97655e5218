"""Captions that are written down as they are made, so that a long run can go on where it ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvspec.evaluation.methods import Method, Output
from lvspec.shapes.evaluation import Clip


@dataclass
class KeptOutput(Output):
    """A caption; `generation` is None where it was read back.

    Attributes:
        strict: Iterations in which a gate had found no threshold.
    """

    strict: int = 0


class KeptOutputs:
    """One line of JSON for every caption of every method.

    Args:
        path: The file, which need not be there; None: nothing is kept.
        settings: What captions depend on besides method and clip. Lines of other settings are left
            alone.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self._lines: dict[tuple[str, str], dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in map(json.loads, path.read_text().splitlines()):
                if line["settings"] == self.settings:
                    self._lines[line["method"], line["clip"]] = line["output"]

    def method(self, name: str, method: Method) -> Method:
        """A method of ours that captions what this file does not have of it."""

        def run(clip: Clip) -> KeptOutput:
            key = name, clip.path.name
            if key in self._lines:
                return KeptOutput(**self._lines[key])
            output = method(clip)
            found = {
                "text": output.text,
                "seconds": output.seconds,
                "ids": output.ids,
                "passes": output.passes,
                "prefill_seconds": output.prefill_seconds,
                "regret": float(output.regret),
                "strict": output.generation.stats.num_strict,
            }
            if self.path is not None:
                self._lines[key] = found
                line = {"method": name, "clip": key[1], "settings": self.settings, "output": found}
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            return KeptOutput(**found, generation=output.generation)

        return run
