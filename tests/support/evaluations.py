"""An evaluation as `lvspec evaluate` writes it, made by hand."""

import captions

from lvspec.evaluation.journal import Journal
from lvspec.reporting.load import EVALUATION

OWN = "a red ball rolls to the left."
TEXTS = {
    "autoregression": [OWN, OWN, OWN],
    "strict": [OWN, OWN, OWN],
    "lvspec": [OWN, "a red ball moves to the left.", f"a {captions.EVIL} rolls."],
}
SCORES = {"autoregression": [1, 1, 1], "strict": [1, 1, 1], "lvspec": [1, 0.9, 0.2]}


def record(method, index, **changes):
    """One line, as `lvspec evaluate` writes it."""
    text, score = TEXTS[method][index], SCORES[method][index]
    steps = {"autoregression": 9, "strict": 4, "lvspec": 2}[method]
    return {
        "id": f"clip {index}",
        "method": method,
        "video": f"clip{index}.mp4",
        "prompt": "what?",
        "error": None,
        "seconds": 0.2 + steps / 10,
        "prefill_s": 0.2,
        "decode_s": steps / 10,
        "text": text,
        "tokens": list(range(10)),
        "stats": {"iterations": steps, "regret": 1 - score, "gamma": 4},
        "acceptance": {
            "steps": steps,
            "drafted": 4 * steps,
            "accepted": 9 - steps,
            "mean_acceptance_length": 9 / steps,
            "acceptance_rate": 0.5,
            "accepted_by_position": [] if method == "autoregression" else [steps, 1, 0, 0],
        },
        "scores": {"own_same": float(text == OWN), "own_chrf": score},
        **changes,
    }


def traced(index):
    """A line of lvspec's with a trace."""
    return {**captions.result(), **record("lvspec", index, tokens=captions.TOKENS)}


SETTINGS = {
    "target": {"name": f"target {captions.EVIL}", "config_hash": "1"},
    "methods": {name: {"policy": None} for name in TEXTS},
}
ALL = [record(method, index) for index in range(3) for method in TEXTS]


def write(path, records=ALL, settings=SETTINGS):
    """The file, by evaluate's own journal; returns its path."""
    path.unlink(missing_ok=True)
    with Journal(path, EVALUATION, settings) as journal:
        for each in records:
            journal.add(each)
    return path


def with_traces():
    """All lines, lvspec's with traces."""
    return [each if each["method"] != "lvspec" else traced(int(each["id"][-1])) for each in ALL]
