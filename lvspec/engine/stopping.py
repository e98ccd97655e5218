"""When a sequence stops besides its end-of-sequence token and its length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os.path import commonprefix

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import ConfidenceCriteria

from lvspec.models.ranks import ALONE, Ranks

# A character is at most four bytes, and a token at least one.
_TOKENS_PER_CHARACTER = 4
# So many more are decoded that what a tokenizer does at the beginning of a text is not looked at.
_MARGIN = 8


class Stopping:
    """HF's stopping criteria and stop strings, asked after every token of a sequence by itself.

    Args:
        criteria: HF's. They get prompt and output, int64 `[1, n]`, on the CPU wherever the models
            are, for the device must not wait for them; and None for the scores, as from HF unless
            scores are returned.
        strings: The output ends with the token that completes one of them, which may begin in the
            prompt; special tokens are text too.
        tokenizer: Decodes the output for `strings`.

    Raises:
        TypeError: `criteria` is not a list of callables, or `strings` not of strings.
        ValueError: There is no tokenizer for `strings`, or a criterion looks at the scores.

    Attributes:
        ranks: The processes that share the target: they stop where the first one does.
    """

    def __init__(
        self,
        criteria: Iterable[StoppingCriteria] | None = None,
        strings: str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.ranks: Ranks = ALONE
        criteria = () if criteria is None else criteria
        if isinstance(criteria, StoppingCriteria) or not isinstance(criteria, Iterable):
            raise TypeError(
                f"stopping_criteria: expected a list, got {type(criteria).__name__} alone"
            )
        self._criteria = StoppingCriteriaList(criteria)
        for criterion in self._criteria:
            if not callable(criterion):
                raise TypeError(
                    f"stopping_criteria: expected callable entries, got {type(criterion).__name__}"
                )
            if isinstance(criterion, ConfidenceCriteria):
                raise ValueError(
                    "stopping_criteria: expected criteria that look at the tokens, got "
                    "ConfidenceCriteria, which needs the scores of every step"
                )
        strings = () if strings is None else strings
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        for string in self._strings:
            if not isinstance(string, str) or not string:
                raise TypeError(f"stop_strings: expected non-empty strings, got {string!r}")
        if self._strings and tokenizer is None:
            raise ValueError("tokenizer: expected one, with which stop_strings are found, got None")
        self._tokenizer = tokenizer
        longest = max(map(len, self._strings), default=0)
        self._window = _TOKENS_PER_CHARACTER * longest + _MARGIN

    def __bool__(self) -> bool:
        return bool(self._criteria or self._strings)

    def first_stop(self, ids: Tensor, num_out: int, new: int) -> int | None:
        """How many of the last `new` tokens are kept, or None if nothing stops.

        Args:
            ids: int64 `[T + num_out]`, prompt and output.
            num_out: Output tokens.
            new: How many of them were not asked about before.
        """
        found = self._first_stop(ids, num_out, new)
        return self.ranks.value(found) if self._criteria else found  # a criterion may go by a clock

    def _first_stop(self, ids: Tensor, num_out: int, new: int) -> int | None:
        prompt_length = ids.shape[0] - num_out
        for count in range(num_out - new + 1, num_out + 1):
            if self._ends_with_a_string(ids[: prompt_length + count], prompt_length):
                return count - num_out + new
            if self._criteria and bool(
                self._criteria(ids[None, : prompt_length + count], None).all()
            ):
                return count - num_out + new
        return None

    def _ends_with_a_string(self, ids: Tensor, prompt_length: int) -> bool:
        """Whether one of the strings ends in the output; it may begin in the prompt, as in HF."""
        if not self._strings:
            return False
        begin = max(0, len(ids) - self._window)
        text = self._text(ids[begin:])
        # What ends in the prompt was there before. Its last character may be half a one.
        ended = commonprefix([self._text(ids[begin:prompt_length]), text])
        return any(
            text.find(string, max(0, len(ended) + 1 - len(string))) >= 0 for string in self._strings
        )

    def _text(self, ids: Tensor) -> str:
        return self._tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
