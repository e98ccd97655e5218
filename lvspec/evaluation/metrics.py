"""How good a text is: against references, against the target's own, and a user's own metric."""

from __future__ import annotations

import importlib
import math
import numbers
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from lvspec.evaluation.choices import choice_of, right_choice
from lvspec.evaluation.samples import Sample

Metric = Callable[[str, Sample, "str | None"], "float | None"]
"""`(text, sample, own)` to a score, 1 being best, or None where it says nothing of the sample;
`own` is what the target says by itself."""


class MetricError(ValueError):
    """A user's metric failed, or returned no number. Names it and the sample."""


def chrf(text: str, references: Sequence[str]) -> float:
    """chrF of sacrebleu, from 0 to 1, against the nearest reference.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    return _similarity(text, references, _chrf)


def bleu(text: str, references: Sequence[str]) -> float:
    """Sentence BLEU of sacrebleu (smoothed), from 0 to 1, against all references.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    score = _needs("sacrebleu").sentence_bleu(text, list(references)).score / 100
    return 1.0 if text in references else min(score, 1.0)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F measure of ROUGE-L (rouge-score), from 0 to 1, against the nearest reference.

    Words are what Unicode takes for them; of languages that put no spaces `chrf` says more.

    Raises:
        ImportError: rouge-score is not installed.
    """
    return _similarity(text, references, _rouge_l)


def same(text: str, references: Sequence[str]) -> float:
    """1 if the text is one of the references but for spaces, else 0."""
    return float(text.split() in [each.split() for each in references])


def _chrf(text: str, reference: str) -> float:
    return _needs("sacrebleu").sentence_chrf(text, [reference]).score / 100


def _rouge_l(text: str, reference: str) -> float:
    return _rouge().score(reference, text)["rougeL"].fmeasure


def _similarity(
    text: str, references: Sequence[str], compare: Callable[[str, str], float]
) -> float:
    # Two empty texts are alike, which libraries for texts do not say.
    return max(1.0 if text == each else min(compare(text, each), 1.0) for each in references)


@lru_cache(maxsize=1)
def _rouge() -> Any:
    scorer = _needs("rouge_score.rouge_scorer", "rouge-score").RougeScorer
    return scorer(["rougeL"], tokenizer=_Words())


class _Words:
    """rouge-score's own drops all but the letters of English."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


def _needs(module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"metrics: expected {package or module}, which is not installed (pip install "
            "'lvspec[evaluate]')"
        ) from error


_TEXT = {"chrf": chrf, "bleu": bleu, "rouge_l": rouge_l, "same": same}


def _of_references(compare: Callable[[str, Sequence[str]], float]) -> Metric:
    def metric(text: str, sample: Sample, own: str | None) -> float | None:
        return compare(text, sample.expected) if sample.expected else None

    return metric


def _of_own(compare: Callable[[str, Sequence[str]], float]) -> Metric:
    def metric(text: str, sample: Sample, own: str | None) -> float | None:
        return None if own is None else compare(text, [own])

    return metric


def choice(text: str, sample: Sample, own: str | None) -> float | None:
    """Whether the text takes the right choice; None for what is not multiple choice."""
    right = right_choice(sample)
    return None if right is None else float(choice_of(text, sample.choices) == right)


def own_choice(text: str, sample: Sample, own: str | None) -> float | None:
    """Whether the text takes the choice of the target's own, or none where that takes none."""
    if own is None or (not sample.choices and right_choice(sample) is None):
        return None
    return float(choice_of(text, sample.choices) == choice_of(own, sample.choices))


METRICS: dict[str, Metric] = {
    "choice": choice,
    **{name: _of_references(_TEXT[name]) for name in ("chrf", "bleu", "rouge_l")},
    "own_choice": own_choice,
    **{f"own_{name}": _of_own(_TEXT[name]) for name in ("same", "chrf", "rouge_l")},
}
"""By name: what needs references or an answer, and from `own_choice` on what is compared with the
target's own text."""


def find_metric(name: str) -> Metric:
    """A metric of `METRICS` by its name, or a user's by `module:name`.

    The function is called as `(text, sample, own)`: the text, its `Sample`, and what the target
    says by itself, or None. It returns a number, 1 being best, or None where it says nothing.
    Modules in the working directory are found too.

    Raises:
        ValueError: There is no such metric, module or function; names it.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(
            f"metric: expected module:name, or one of {', '.join(METRICS)}, got {name!r}"
        )
    found = _import(module, name)
    for part in function.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"metric: expected a function {function} in {module}, got {found!r}")
    return _checked(name, found)


def score(text: str, sample: Sample, own: str | None, names: Iterable[str]) -> dict[str, float]:
    """What the metrics with these names say, but for those that say nothing of this sample.

    Raises:
        ImportError: A metric needs what is not installed.
        MetricError: A user's metric failed; names it and the sample.
        ValueError: There is no metric of such a name.
    """
    found = {name: find_metric(name)(text, sample, own) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def check_installed() -> None:
    """Refuse, before any work is done, to go without the libraries that count.

    Raises:
        ImportError: One is not installed; names all that are needed.
    """
    for module, package in (
        ("sacrebleu", "sacrebleu"),
        ("rouge_score.rouge_scorer", "rouge-score"),
        ("scipy.special", "scipy"),
    ):
        _needs(module, package)


def _import(module: str, name: str) -> Any:
    # At the end: a file here must not stand in for a package that others mean.
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"metric: expected a module that can be imported, got {name}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _checked(name: str, function: Callable[..., Any]) -> Metric:
    def metric(text: str, sample: Sample, own: str | None) -> float | None:
        try:
            value = function(text, sample, own)
        except Exception as error:
            raise MetricError(
                f"{name}: failed on sample {sample.id}: {type(error).__name__}: {error}"
            ) from error
        if value is None:
            return None
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise MetricError(f"{name}: expected a number for sample {sample.id}, got {value!r}")
        return float(value)

    return metric
