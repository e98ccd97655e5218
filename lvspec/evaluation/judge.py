"""A judge of captions: any endpoint that speaks OpenAI's chat completions.

What is asked has the form of the judges of VDC and MovieChat-1K: the caption is asked questions
whose answers are known, and each answer is compared with the right one, by yes or no and by a score
from 0 to 5.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lvspec.evaluation.samples import Sample

_ANSWERER = (
    "You answer questions about a video of which you know a description alone. Read the "
    "description, use nothing else, and answer in a few words."
)
_MATCHER = (
    "You decide whether a predicted answer to a question about a video means the same as the right "
    "answer. Synonyms and other wordings of the same are right; what contradicts the right answer "
    "or leaves out its point is wrong."
)
_FORM = (
    'Reply with a JSON object and nothing else: {"pred": "yes" or "no", "score": an integer from 0 '
    "to 5}, where 5 is the same meaning and 0 nothing of it."
)


class JudgeError(RuntimeError):
    """The judge did not answer, or not in the form that was asked for."""


@dataclass(frozen=True)
class Judge:
    """An endpoint that judges.

    Args:
        url: Of the service, as `https://host/v1`, or with `/chat/completions` at its end.
        model: Its name there.
        key: Sent as a bearer token, and written nowhere; None: none is sent.
        timeout: Seconds for one answer.
        attempts: How often a question is asked where the service is busy or fails.
        pause: Seconds before the second attempt; doubled for each further one.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    attempts: int = 4
    pause: float = 1.0

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"judge_url: expected http:// or https://, got {self.url!r}")
        if not self.model.strip():
            raise ValueError("judge_model: expected a name, got an empty one")

    def scores(self, text: str, sample: Sample) -> dict[str, float]:
        """What the judge says of a caption.

        Returns:
            `judge`, the share of questions that it answers rightly, and `judge_score`, the mean
            score, both from 0 to 1. Nothing for samples without questions, references or a free
            answer.

        Raises:
            JudgeError: It does not answer, or not in the form that was asked for.
        """
        verdicts = [
            self._match(question, answer, self._answer(text, question))
            for question, answer in sample.questions
        ]
        if not sample.questions and sample.expected:
            verdicts = [max(self._match(sample.prompt, each, text) for each in sample.expected)]
        if not verdicts:
            return {}
        right, score = (fmean(column) for column in zip(*verdicts))
        return {"judge": right, "judge_score": score / 5}

    def _answer(self, caption: str, question: str) -> str:
        return self._ask(_ANSWERER, f"Description:\n{caption}\n\nQuestion: {question}")

    def _match(self, question: str, answer: str, predicted: str) -> tuple[bool, float]:
        """(right, score from 0 to 5)."""
        asked = f"Question: {question}\nRight answer: {answer}\nPredicted answer: {predicted}\n\n"
        said = ""
        for _ in range(2):  # a judge that once falls out of the form may not the second time
            said = self._ask(_MATCHER, asked + _FORM)
            verdict = re.search(r"""['"]?pred['"]?\s*:\s*['"]?(yes|no)\b""", said, re.IGNORECASE)
            score = re.search(r"""['"]?score['"]?\s*:\s*['"]?(\d+(?:\.\d+)?)""", said)
            if verdict and score and float(score[1]) <= 5:
                return verdict[1].lower() == "yes", float(score[1])
        raise JudgeError(f"judge: expected pred and score from 0 to 5, got {said!r:.200}")

    def _ask(self, system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 256}
        pause = self.pause
        for attempt in range(1, self.attempts + 1):
            try:
                return _content(self._post(body))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(200).decode('utf-8', 'replace')}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    break  # it would say so again
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.attempts:
                time.sleep(pause)
                pause *= 2
        raise JudgeError(f"judge: expected an answer of {self.url}, got {problem}")

    def _post(self, body: dict[str, Any]) -> bytes:
        url = self.url.rstrip("/")
        if not url.endswith("/chat/completions"):
            url += "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=self.timeout) as answer:
            return answer.read()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another host must not be sent the key."""

    def redirect_request(self, *_: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _content(answer: bytes) -> str:
    try:
        found = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise JudgeError(f"judge: expected a chat completion, got {answer[:200]!r}") from error
    if not isinstance(found, str) or not found.strip():
        raise JudgeError(f"judge: expected a text, got {found!r}")
    return found.strip()
