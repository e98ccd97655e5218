"""The document of `e2e.py`: what an earlier run has left of it, and every figure at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pairs.measure import OURS, OUT_OF_TIME, is_open
from rich.console import Console

from lvspec.config import DecodeConfig
from lvspec.environment import write_json

RUN = ("kind", "gamma", "set", "options", "backend", "environment")
"""What must be equal for a run to go on with what another has measured."""
ROW = ("pair", "label", "context", "batch")


def earlier(path: Path | None, document: dict[str, Any]) -> dict[str, Any] | None:
    """What stands in the file if it is of such a run as this, or None."""
    try:
        found = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return None
    # As JSON, in which a tuple is a list.
    wanted = json.loads(json.dumps({name: document[name] for name in RUN}))
    is_same = isinstance(found, dict) and wanted == {name: found.get(name) for name in RUN}
    return found if is_same else None


class Report:
    """The document, written after every method, and what is printed of it.

    If there is a file of a run with the same options, commit and device, its figures stay, and what
    has none is tried. The file of any other run is replaced.
    """

    def __init__(self, path: Path | None, document: dict[str, Any]) -> None:
        self.path, self.document, self.console = path, document, Console()
        self.failed = False
        document["pairs"] = []
        found = earlier(path, document)
        if found is not None:
            rows = [row for row in found["pairs"] if "not_measured" not in row]
            for row in rows:
                measured = {name: its for name, its in row["methods"].items() if "wall_ms" in its}
                row["methods"] = measured
            document |= {**found, "pairs": rows}
            self._print(f"{path}: going on with {len(rows)} rows")
        self.write()

    def row(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The row of these facts in the document: an earlier one, or a new one at its end."""
        for row in self.document["pairs"]:
            if all(row[name] == facts[name] for name in ROW):
                return row
        self.document["pairs"].append(dict(facts))
        return self.document["pairs"][-1]

    def refuse(self, row: dict[str, Any], names: list[str], reason: str) -> None:
        """Nothing can be measured of a row, or none of the methods that are still open."""
        if "methods" in row:
            row["methods"] |= {name: {"not_measured": reason} for name in names}
        else:
            row["not_measured"] = reason
        self.write()
        self.show(row, names)

    def show(self, row: dict[str, Any], names: list[str]) -> None:
        """Print these methods of a row and what follows; ours without a figure are a failure."""
        name = f"{row['label']}, context {row['context']}, batch {row['batch']}"
        if "not_measured" in row:
            self._print(f"{name}: not measured: {row['not_measured']}")
            return
        self._print(f"{name}, {row['replayed']}")
        for method in names:
            found = row["methods"][method]
            if "not_measured" in found:
                # A peer may be absent; that ours says nothing is a failure, unless time was over.
                is_ours = method in OURS and found["not_measured"] != OUT_OF_TIME
                self.failed = self.failed or is_ours
                line = f"not measured: {found['not_measured']}"
            else:
                line = f"{found['wall_ms']:9.3f} ms"
                if "limit_ms" in found:
                    line += f", limit {found['limit_ms']:.3f} ({found['share_of_limit']:.0%})"
                line += f", {found['loop']}" if "loop" in found else ""
                if found.get("other_parts"):
                    self.failed = True
                    line += f"; parts: {'; '.join(found['other_parts'])}"
            self._print(f"  {method:22} {line}")
        for check, said in row["checks"].items():
            self._print(f"  {check}: {said}")
        if "speedup" in row:
            self._print(f"  speed-up {row['speedup']:.2f}x")

    def embedded(
        self, config: DecodeConfig, count: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """The embedded pair, if clips can be written here; without, the other part goes on."""
        if "rows" in self.document.get("embedded", {}):
            return
        try:
            from pairs.embedded import embedded_rows, embedded_table
        except ModuleNotFoundError as error:
            found = {"not_measured": f"{error.name} is not installed"}
            self._print(f"embedded pair: not measured: {found['not_measured']}")
        else:
            found = embedded_rows(config, count, device, dtype)
            self.console.print(embedded_table(found))
        self.document["embedded"] = found
        self.write()

    def write(self) -> None:
        if self.path:
            write_json(self.path, self.document)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)


def open_methods(row: dict[str, Any], names: list[str]) -> list[str]:
    """Those of `names` that are still to be measured; none in a row that cannot be."""
    if "not_measured" in row:
        return []
    return [name for name in names if is_open(row.get("methods", {}).get(name))]
