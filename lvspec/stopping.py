"""When a sequence stops besides its end-of-sequence token and its length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import ConfidenceCriteria, StopStringCriteria


def stopping_list(
    stopping_criteria: Iterable[StoppingCriteria] | None,
    stop_strings: str | Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> StoppingCriteriaList:
    """All criteria of a run, those of `stop_strings` made with `tokenizer`.

    Raises:
        TypeError: `stopping_criteria` is not a list of callables, or `stop_strings` not of strings.
        ValueError: There is no tokenizer for `stop_strings`, or a criterion looks at the scores.
    """
    found = () if stopping_criteria is None else stopping_criteria
    if isinstance(found, StoppingCriteria) or not isinstance(found, Iterable):
        raise TypeError(f"stopping_criteria: expected a list, got {type(found).__name__} alone")
    criteria = StoppingCriteriaList(found)
    for criterion in criteria:
        if not callable(criterion):
            raise TypeError(
                f"stopping_criteria: expected callable entries, got {type(criterion).__name__}"
            )
        if isinstance(criterion, ConfidenceCriteria):
            raise ValueError(
                "stopping_criteria: expected criteria that look at the tokens, got "
                "ConfidenceCriteria, which needs the scores of every step"
            )
    if stop_strings is None:
        return criteria
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise TypeError(f"stop_strings: expected non-empty strings, got {string!r}")
    if tokenizer is None:
        raise ValueError("tokenizer: expected one, with which stop_strings are found, got None")
    if strings:
        criteria.append(StopStringCriteria(tokenizer, strings))
    return criteria


def first_stop(criteria: StoppingCriteriaList, ids: Tensor, new: int) -> int | None:
    """How many of the last `new` tokens are kept, or None if all are and nothing stops.

    HF asks after every token, and so are the criteria asked here: for the ids up to each of the new
    tokens, in order. `scores` are None, as HF's are unless they are returned.

    Args:
        criteria: Asked one after the other.
        ids: int64 `[n]`, prompt and output.
        new: How many of them were not asked about before.
    """
    length = ids.shape[0]
    for kept in range(1, new + 1):
        if bool(criteria(ids[None, : length - new + kept], None).all()):
            return kept
    return None
