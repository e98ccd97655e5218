"""One size of one pair, by every method; what follows from their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from measuring.clock import Budget, release
from ops.reasons import Unavailable, Wrong
from pairs.row import Row

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
COMPILED = "hf static, compiled"
"""Takes a minute or two, so it is measured only if asked for."""
PEERS = tuple(name for name in METHODS if name not in (*OURS, COMPILED))

OUT_OF_TIME = "out of time"
NOT_REACHED = "not reached"
"""What a method has that was interrupted, or stood behind one that was."""


def is_open(found: dict[str, Any] | None) -> bool:
    """Whether a method is still to be measured: it was not, and nothing speaks against it."""
    return found is None or found.get("not_measured") in (OUT_OF_TIME, NOT_REACHED)


def measure_row(
    row: Row,
    budget: Budget,
    names: Iterable[str] | None = None,
    found: dict[str, Any] | None = None,
    save: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What is known of a pair at a size; a method that fails says why and stops no other.

    Args:
        row: The pair at that size.
        budget: When it is over nothing new is begun.
        names: Of METHODS; all by default. What `found` has of them stays.
        found: What is known already; it is added to, and returned.
        save: Called before the first method and behind each: what is known then survives.
    """
    found = {} if found is None else found
    methods = found.setdefault("methods", {})
    chosen = [name for name in names or METHODS if is_open(methods.get(name))]
    methods |= {name: {"not_measured": NOT_REACHED} for name in chosen}
    found.setdefault("checks", {})
    found.setdefault("on_paper", row.on_paper())
    save()
    for name in chosen:
        if budget.left <= 0:
            methods[name] = {"not_measured": OUT_OF_TIME}
            continue
        release(row.device)
        methods[name] = _measured(name, row)
        found["checks"] |= row.checks
        found |= _conclusions(methods, row.plan.trace.tau)
        save()
    release(row.device)
    save()
    return found


def _measured(name: str, row: Row) -> dict[str, Any]:
    try:
        return METHODS[name](row)
    except Unavailable as reason:
        return {"not_measured": str(reason)}
    except Wrong as reason:
        return {"not_measured": f"wrong: {reason}"}
    except torch.OutOfMemoryError:
        return {"not_measured": "out of memory"}
    except Exception as error:  # a peer's failure is a fact about it, ours is in the row
        said = str(error).splitlines() or [""]
        return {"not_measured": f"{type(error).__name__}: {said[0][:200]}"}


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
