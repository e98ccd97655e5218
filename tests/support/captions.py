"""Captions as `lvspec generate --trace --json` writes them, made by hand: one of every kind."""

from lvspec.engine.result import TraceStep
from lvspec.policy import AcceptancePolicy
from lvspec.reporting.load import CAPTIONS, CAPTIONS_VERSION

EVIL = "<script>alert(1)</script>"
WORDS = ["the", " clip", " shows", " a", " red", " blue", " ball", "room", ",", " small", "\n"]
WORDS += [f" {EVIL}", " tiny", "ü", "<|im_end|>", " ends"]
IDS = {word: 10 + number for number, word in enumerate(WORDS)}
END = IDS["<|im_end|>"]


def row(best, second, regret):
    """(ids, log-probabilities) of a row whose best token is `best`, before what was drafted."""
    others = [
        word for word in (second, " a", " red", "ü", " clip", "room") if word not in ("", best)
    ]
    ids = [IDS[word] for word in (best, *dict.fromkeys(others))]
    return ids[:5], [-0.4, -0.4 - (regret or 1.0), -7.0, -8.0, -9.0]


def step(position, drafted, wanted, relevance, *, path, kinds, regrets, threshold=0.06):
    """A chain; words by their text."""
    behind = zip(wanted, [*drafted, ""], [*regrets, 0.0])
    rows = [row(word, second, regret) for word, second, regret in behind]
    return TraceStep(
        position=position,
        drafted=[IDS[word] for word in drafted],
        parents=list(range(len(drafted))),
        wanted=[IDS[word] for word in wanted],
        relevance=relevance,
        anchor_threshold=threshold,
        path=path,
        kinds=kinds,
        log_probs=[-0.4 - regret for regret in regrets],
        regrets=regrets,
        entropies=[0.5] * len(wanted),
        top_ids=[ids for ids, _ in rows],
        top_log_probs=[log_probs for _, log_probs in rows],
    )


STEPS = [
    step(
        *(1, [" clip", " shows", " small", " red"], [" clip", " shows", " tiny", " blue", " a"]),
        [0.02, 0.03, 0.02, 0.3, 0.01],
        path=[1, 2, 3],
        kinds=["exact", "exact", "loose"],
        regrets=[0.0, 0.0, 0.4, 5.0],
    ),
    step(
        *(5, [" ball", "room", ",", " a"], ["room", "room", "\n", f" {EVIL}", " a"]),
        [0.02, 0.2, 0.015, 0.02, 0.02],
        path=[1, 2],
        kinds=["shift", "exact"],
        regrets=[0.9, 0.0, 6.0, 3.0],
    ),
    step(
        *(8, [f" {EVIL}", "ü", "<|im_end|>"], [f" {EVIL}", "ü", "<|im_end|>", " ends"]),
        [0.02, 0.01, 0.02, 0.02],
        path=[1, 2, 3],
        kinds=["exact", "exact", "exact"],
        regrets=[0.0, 0.0, 0.0],
    ),
]
PIECES = ["the", " clip", " shows", " small", " blue", " ball", "room", "\n", f" {EVIL}", "ü", ""]
TOKENS = [IDS[word] for word in PIECES[:-1]] + [END]
KINDS = ["bonus", "exact", "exact", "loose", "bonus", "shift", "exact", "bonus"] + ["exact"] * 3
RELEVANCE = [None, 0.02, 0.03, 0.02, 0.3, 0.02, 0.2, 0.015, 0.02, 0.01, 0.02]


def result(video="clip.mp4", *, traced=True, **changes):
    """One caption."""
    found = {
        "video": video,
        "prompt": f"what? {EVIL}",
        "text": "".join(PIECES).strip(),
        "pieces": PIECES,
        "tokens": TOKENS,
        "kinds": KINDS,
        "relevance": RELEVANCE,
        "anchors": [value is not None and value >= 0.06 for value in RELEVANCE],
        "stats": {
            "iterations": 3,
            "gamma": 4,
            "drafted": 10,
            "tau": 10 / 3,
            "acceptance_by_position": [1.0, 1.0, 0.67, 0.0],
            "counts": {"exact": 6, "loose": 1, "shift": 1, "bonus": 3, "rejected": 2},
            "regret": 1.3,
            "gate": "on",
            "anchor_threshold": 0.06,
            "seconds": {
                "prefill": 0.2,
                "draft": 0.1,
                "verify": 0.15,
                "accept": 0.01,
                "commit": 0.002,
                "iteration": 0.0,
                "warm-up": 0.5,
                "capture": 0.0,
            },
        },
        "error": None,
        "interrupted": False,
    }
    if traced:
        found["trace"] = [each.to_dict() for each in STEPS]
        found["vocabulary"] = {str(number): word for word, number in IDS.items()}
        found["frames"] = {
            "timestamps": [0.0, 1.0],
            "mass": [[None, None], *([0.1, 0.02 * i] for i in range(1, len(TOKENS)))],
        }
    return {**found, **changes}


def document(*results, **changes):
    """The file."""
    return {
        "lvspec": CAPTIONS,
        "version": CAPTIONS_VERSION,
        "environment": {"torch": "2", "device_name": f"a processor {EVIL}"},
        "interrupted": False,
        "target": f"target {EVIL}",
        "draft": "draft",
        "frames": {"num_frames": None, "fps": 2.0},
        "policy": AcceptancePolicy.lvspec(strict_ids=(IDS[","],)).to_dict(),
        "config": {"gamma": 4, "max_new_tokens": 64},
        "results": list(results) or [result()],
        **changes,
    }
