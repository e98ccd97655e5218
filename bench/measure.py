"""One size of one pair, by every method; what follows from their figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from clock import Budget, release
from reasons import Unavailable, Wrong
from row import Row

METHODS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "lvspec": Row.lvspec,
    "autoregression": Row.autoregression,
    "lvspec eager": Row.lvspec_eager,
    "lvspec, specvlm tree": Row.specvlm_tree,
    "hf generate": Row.hf_generate,
    "specvlm step": Row.specvlm_step,
    "hf assisted": Row.hf_assisted,
    "hf static, compiled": Row.hf_static,
}
OURS = ("lvspec", "autoregression", "lvspec eager", "lvspec, specvlm tree")


def measure_row(row: Row, budget: Budget) -> dict[str, Any]:
    """All that is known of a pair at a size; a method that fails says why and stops no other."""
    methods: dict[str, Any] = {}
    for name, method in METHODS.items():
        if name not in OURS and not row.plan.peers:
            continue
        if budget.left <= 0:
            methods[name] = {"not_measured": "out of time"}
            continue
        release(row.device)
        try:
            methods[name] = method(row)
        except Unavailable as reason:
            methods[name] = {"not_measured": str(reason)}
        except Wrong as reason:
            methods[name] = {"not_measured": f"wrong: {reason}"}
        except torch.OutOfMemoryError:
            methods[name] = {"not_measured": "out of memory"}
        except Exception as error:  # a peer's failure is a fact about it, ours is in the row
            said = str(error).splitlines() or [""]
            methods[name] = {"not_measured": f"{type(error).__name__}: {said[0][:200]}"}
    release(row.device)
    return {
        "methods": methods,
        "checks": row.checks,
        "on_paper": row.on_paper(),
        **_conclusions(methods, row.plan.trace.tau),
    }


def _conclusions(methods: dict[str, Any], tau: float) -> dict[str, Any]:
    """What follows at this tau: speed-ups over autoregression and over the peers."""

    def ms(name: str) -> float | None:
        return methods.get(name, {}).get("wall_ms")

    ours, alone, tree = ms("lvspec"), ms("autoregression"), ms("lvspec, specvlm tree")
    found: dict[str, Any] = {"tau": tau}
    if ours and alone:
        found["speedup"] = tau * alone / ours
        found["tau_to_gain"] = ours / alone
    if ours and ms("hf assisted"):
        found["over_hf_assisted"] = ms("hf assisted") / ours
    if tree and ms("specvlm step"):
        found["over_specvlm_step"] = ms("specvlm step") / tree
    return found
