"""The loop: every clip gets its row, whatever breaks, and it knows when to stop."""

import functools
from collections import deque

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig
from lvspec.captioning import loop as loops
from lvspec.captioning.loop import CaptionsStopped, Loop
from lvspec.captioning.meter import Meter
from lvspec.captioning.preparing import Prepared
from lvspec.engine.api import generate
from lvspec.engine.decoder import Decoder
from lvspec.evaluation.samples import Sample

CONFIG = DecodeConfig(gamma=3, max_new_tokens=6)


class Ready:
    """Stands in for workers: clips are prepared at once, but `late` of them a few looks later."""

    def __init__(self, make, late=()):
        self._make, self._late = make, set(late)
        self._jobs = deque()
        self.looks = 0

    @property
    def wants_more(self):
        return len(self._jobs) < 4

    def give(self, job):
        self._jobs.append(job)

    def take(self, timeout):
        self.looks += 1
        if self._jobs and self._jobs[0].number in self._late:
            if self.looks % 4:
                return None
            self._late.discard(self._jobs[0].number)
        return self._make(self._jobs.popleft()) if self._jobs else None


@pytest.fixture
def make(make_prompt):
    """What becomes of a job: `bad` videos fail, others are prompts of their number."""

    def prepare(job):
        if job.video == "bad other":
            return Prepared(job.number, error="another")
        if job.video.startswith("bad"):
            return Prepared(job.number, error=f"not a video: {job.video}")
        prompt = make_prompt(2, ("video", 2, 4, 4), 3 + job.number % 3, seed=job.number)
        return Prepared(job.number, inputs=(prompt,), warnings=("torn",))

    return prepare


def run(pair, workers, videos, *, should_stop=lambda: False):
    rows = []
    decoder = Decoder(*pair[:2], AcceptancePolicy.strict(), CONFIG, batch_size=3)
    meter = Meter(3)
    loop = Loop(decoder, pair[0].device, workers, "abc", rows.append, meter, should_stop)
    try:
        loop.run([Sample(str(index), video, "what?") for index, video in enumerate(videos)])
    finally:
        run.meter = meter
    return rows


def test_every_clip_has_its_row_and_its_own_tokens(random_pair, make):
    videos = ["a.mp4", "bad.mp4", *(f"{index}.mp4" for index in range(7))]
    rows = run(random_pair, Ready(make, late=[2, 3, 6]), videos)
    assert sorted(row["id"] for row in rows) == [str(index) for index in range(9)]
    for row in rows:
        if row["video"] == "bad.mp4":
            assert row["error"] == "not a video: bad.mp4" and row["tokens"] is None
            continue
        alone = generate(
            *random_pair[:2],
            make(_Job(int(row["id"]), row["video"])).inputs[0],
            policy=AcceptancePolicy.strict(),
            config=CONFIG,
        )
        assert row["tokens"] == alone.tokens[0].tolist() and row["tau"] == alone.stats.tau
        assert row["warnings"] == ["torn"] and row["settings"] == "abc" and row["error"] is None
    assert run.meter.to_dict()["captions"] == 8 and run.meter.to_dict()["failed"] == 1


class _Job:
    def __init__(self, number, video):
        self.number, self.video = number, video


def test_chains_are_as_long_as_the_first_clips_say(random_pair, make, monkeypatch):
    """Which is known when some have ended, and not a million clips later."""
    monkeypatch.setattr("lvspec.engine.length.ENOUGH", 1)
    config = DecodeConfig(max_new_tokens=6, cost_ratio=0.1)  # no clock decides
    models = *random_pair[:2], AcceptancePolicy.typical(), config
    decoder, rows = Decoder(*models, batch_size=3), []
    assert decoder.engine.choice.acceptance_by == "policy"
    loop = Loop(
        decoder, random_pair[0].device, Ready(make), "abc", rows.append, Meter(3), lambda: False
    )
    loop.run([Sample(str(index), "a.mp4", "what?") for index in range(7)])
    assert decoder.engine.choice.acceptance_by == "generations"
    assert sorted(row["id"] for row in rows) == [str(index) for index in range(7)]


def test_who_breaks_the_models_breaks_nobody_else(random_pair, make, monkeypatch):
    """An error that says nothing of whose it is: all that were under way are done by themselves."""
    target = random_pair[0]
    forward = target.forward

    @functools.wraps(forward)
    def breaks(*args, **kwargs):
        if kwargs["input_ids"].shape[1] % 3 == 0:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **kwargs)

    lengths = {n: make(_Job(n, "a.mp4")).inputs[0]["input_ids"].shape[1] for n in range(6)}
    monkeypatch.setattr(target, "forward", breaks)
    rows = run(random_pair, Ready(make), ["a.mp4"] * 6)
    assert sorted(int(row["id"]) for row in rows) == list(range(6))
    broken = {int(row["id"]) for row in rows if row["error"] is not None}
    assert broken == {n for n, length in lengths.items() if length % 3 == 0} and broken
    assert all("out of memory" in row["error"] for row in rows if row["error"])


def test_ten_alike_in_a_row_stop_the_run(random_pair, make):
    videos = [f"bad{index}.mp4" for index in range(20)]
    rows = []
    with pytest.raises(CaptionsStopped, match="got 10 in a row that fail with: not a video: the"):
        rows = run(random_pair, Ready(make), videos)
    assert run.meter.failed == 10 and not rows
    # One with another error begins the count anew.
    videos = [*videos[:9], "bad other", *videos[9:18]]
    rows = run(random_pair, Ready(make), videos)
    assert len(rows) == 19 == run.meter.failed


def test_asked_to_stop_it_finishes_what_is_under_way(random_pair, make):
    seen = []

    def should_stop():
        return bool(seen)

    class Counting(Ready):
        def take(self, timeout):
            found = super().take(timeout)
            if self.looks == 3:  # three are under way
                seen.append(True)
            return found

    rows = run(random_pair, Counting(make), ["a.mp4"] * 12, should_stop=should_stop)
    assert 3 <= len(rows) <= 4 and all(row["error"] is None for row in rows)


def test_idle_places_are_seen(random_pair, make, monkeypatch):
    monkeypatch.setattr(loops, "_PATIENCE", 0.01)
    rows = run(random_pair, Ready(make, late=range(1, 9)), ["a.mp4"] * 9)
    assert len(rows) == 9 and run.meter.to_dict()["empty"] > 0
