"""The judge: what is asked and sent, what is read, and a service that fails."""

import json
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from lvspec.evaluation.journal import Journal
from lvspec.evaluation.judge import Judge, JudgeError
from lvspec.evaluation.samples import Sample
from lvspec.evaluation.scoring import judged, scored

ASKED = Sample(
    "a:camera",
    "a.mp4",
    "Describe the camera work.",
    references=("The camera pans.",),
    questions=(("Does it pan?", "Yes"), ("Is there a zoom?", "No")),
)
ANSWER = Sample("b", "b.mp4", "Who rows?", answer="a man")


class Service:
    """A local endpoint that gives these answers, one after the other, and keeps the requests.

    An answer is a text, or (status, headers, body).
    """

    def __init__(self, answers):
        self.answers, self.requests = deque(answers), []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.requests.append((self.path, dict(self.headers), json.loads(body)))
                answer = service.answers.popleft()
                if isinstance(answer, str):
                    message = {"choices": [{"message": {"content": answer}}]}
                    answer = 200, {}, json.dumps(message)
                status, headers, body = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def judge(self, **options):
        return Judge(self.url, "some-model", **{"pause": 0.001, "timeout": 60, **options})

    def said(self, index):
        return self.requests[index][2]["messages"][-1]["content"]


@pytest.fixture
def service():
    made = []

    def make(*answers):
        made.append(Service(answers))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


YES, NO = '{"pred": "yes", "score": 5}', "{'pred': 'no', 'score': 1}"


def test_questions_are_asked_of_the_caption(service):
    """As VDC's judge: each question is answered from the caption, and the answer is compared."""
    found = service("It pans.", YES, "There is one.", NO)
    scores = found.judge(key="secret").scores("The camera pans left.", ASKED)
    assert scores == {"judge": 0.5, "judge_score": pytest.approx(6 / 10)}
    path, headers, body = found.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "some-model" and body["temperature"] == 0
    assert "The camera pans left." in found.said(0) and "Does it pan?" in found.said(0)
    assert "Yes" not in found.said(0), "the answer is not given away"
    for part in ("Does it pan?", "Right answer: Yes", "Predicted answer: It pans."):
        assert part in found.said(1)
    assert "Predicted answer: There is one." in found.said(3)


def test_an_answer_is_compared(service):
    """As MovieChat's judge: the caption itself is the answer to the prompt."""
    found = service(YES)
    assert found.judge().scores("A man.", ANSWER) == {"judge": 1, "judge_score": 1}
    assert "Question: Who rows?" in found.said(0)
    assert "Authorization" not in found.requests[0][1]


def test_the_nearest_of_several_references_counts(service):
    sample = Sample("c", "c.mp4", "What?", references=("a cat", "a dog"))
    assert service(NO, YES).judge().scores("A dog.", sample)["judge"] == 1


def test_nothing_to_judge(service):
    assert service().judge().scores("A man.", Sample("d", "d.mp4", "What?")) == {}


def test_a_form_that_is_missed_once(service):
    found = service("I think it is right.", "Sure: {'pred': 'Yes', 'score': '4'}")
    assert found.judge().scores("A man.", ANSWER) == {"judge": 1, "judge_score": 0.8}
    for wrong in ("yes", '{"pred": "yes", "score": 9}', '{"pred": "maybe", "score": 3}'):
        with pytest.raises(JudgeError, match="judge: expected pred and score from 0 to 5, got"):
            service(wrong, wrong).judge().scores("A man.", ANSWER)


def test_a_busy_service_is_asked_again(service):
    busy = 429, {}, "slow down"
    found = service(busy, (503, {}, "later"), YES)
    assert found.judge().scores("A man.", ANSWER)["judge"] == 1 and len(found.requests) == 3
    found = service(*[busy] * 4)
    with pytest.raises(JudgeError, match="HTTP 429: slow down"):
        found.judge().scores("A man.", ANSWER)


def test_what_asking_again_does_not_mend(service):
    found = service((401, {}, "who are you?"))
    with pytest.raises(JudgeError, match="HTTP 401: who are you"):
        found.judge(key="secret").scores("A man.", ANSWER)
    assert len(found.requests) == 1
    for body in ("<html>", '{"choices": []}', '{"choices": [{"message": {"content": ""}}]}'):
        with pytest.raises(JudgeError, match="judge: expected a (chat completion|text), got"):
            service((200, {}, body)).judge().scores("A man.", ANSWER)


def test_the_key_goes_nowhere_else(service):
    """Another host that a service points to is not asked, and no message or repr has the key."""
    other = service(YES)
    found = service((302, {"Location": other.url}, ""))
    judge = found.judge(key="secret")
    with pytest.raises(JudgeError, match="HTTP 302") as error:
        judge.scores("A man.", ANSWER)
    assert not other.requests and "secret" not in f"{error.value} {judge!r}"


def test_nobody_there():
    judge = Judge("http://127.0.0.1:9", "m", attempts=2, pause=0.001, timeout=1)
    with pytest.raises(JudgeError, match="judge: expected an answer of http://127.0.0.1:9, got"):
        judge.scores("A man.", ANSWER)


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", ""])
def test_a_url_that_is_none(url):
    with pytest.raises(ValueError, match="judge_url: expected http:// or https://, got"):
        Judge(url, "m")
    with pytest.raises(ValueError, match="judge_model: expected a name"):
        Judge("http://127.0.0.1", " ")


@pytest.fixture
def journal(tmp_path):
    """Captions of two methods, which say the same of `ANSWER`, and one that failed."""
    with Journal(tmp_path / "records.jsonl", "evaluation", {}) as found:
        for method, text in (("autoregression", "A man."), ("strict", "A man."), ("fly", "Boat")):
            record = {"id": "b", "method": method, "video": "b.mp4", "error": None, "text": text}
            found.add(record)
        found.add({"id": "b", "method": "lvspec", "video": "b.mp4", "error": "no room"})
        yield found


def scores_of(journal):
    return {record["method"]: record.get("scores") for record in journal.records}


def test_captions_are_judged_once(service, journal):
    """Equal ones together, and none again when the command is repeated; scores of metrics stay."""
    found = service(YES, NO)
    assert judged(found.judge(), [ANSWER], journal, False) == []
    assert scored([ANSWER], journal, (), "autoregression") == []
    scores = scores_of(journal)
    assert scores["autoregression"]["judge"] == scores["strict"]["judge"] == 1
    assert scores["fly"]["judge"] == 0 and scores["fly"]["judge_score"] == 0.2
    assert scores["strict"]["own_same"] == 1 and scores["fly"]["own_same"] == 0
    assert scores["lvspec"] is None and len(journal.records) == 4
    assert judged(found.judge(), [ANSWER], journal, False) == [] and len(found.requests) == 2
    other = service(*[NO] * 2)
    judged(Judge(other.url, "another"), [ANSWER], journal, False)
    scored([ANSWER], journal, (), "autoregression")
    assert scores_of(journal)["strict"]["judge"] == 0, "another model judges anew"


def test_what_the_judge_leaves_open_is_said(service, journal):
    found = service(YES, (400, {}, "no"))
    (note,) = judged(found.judge(), [ANSWER], journal, False)
    assert note.startswith("1 captions are not judged, the same command asks again: judge: ")
    again = service(NO)
    assert judged(again.judge(), [ANSWER], journal, False) == [] and len(again.requests) == 1


def test_a_judge_that_is_not_there_is_given_up(service, journal):
    found = service(*[(400, {}, "no")] * 3)
    for name in ("c", "d", "e"):
        journal.add({"id": "b", "method": name, "video": "b.mp4", "error": None, "text": name})
    (note,) = judged(found.judge(), [ANSWER], journal, False)
    assert note.startswith("6 captions are not judged") and len(found.requests) == 3
