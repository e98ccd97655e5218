"""Processes that prepare clips: what comes back, and what becomes of those that die."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from clip_recipes import Recipe, Stuck, Unloadable

from lvspec.captioning.preparing import Job
from lvspec.captioning.workers import Workers, _Child

VIDEOS = ["a.mp4", "bad-1.mp4", "die-1.mp4", "torn-1.mp4", *(f"b{index}.mp4" for index in range(6))]


def taken(workers):
    """The next one."""
    while (found := workers.take(0.1)) is None:
        pass
    return found


def results(workers, jobs, seconds=600):
    """Of all jobs, given as there is room, by number."""
    found, waiting, end = {}, list(jobs), time.monotonic() + seconds
    while len(found) < len(jobs):
        assert time.monotonic() < end, found
        while waiting and workers.wants_more:
            workers.give(waiting.pop(0))
        result = workers.take(0.2)
        if result is not None:
            assert result.number not in found
            found[result.number] = result
    assert workers.outstanding == 0 and workers.take(0) is None
    return found


def test_every_clip_comes_back_once_whoever_dies():
    jobs = [Job(index, video, "what?") for index, video in enumerate(VIDEOS)]
    with Workers(Recipe(parts=2), 1, ahead=2) as workers:
        workers.give(jobs[0])
        for number in (signal.SIGINT, signal.SIGTERM):  # to all processes, while one still starts
            os.kill(*workers.pids, number)
        found = {0: taken(workers), **results(workers, jobs[1:])}
        pids = workers.pids
        for pid in pids:  # nobody is at work: nothing is lost, and the next job has a new process
            os.kill(pid, signal.SIGKILL)
        while workers.pids:
            assert workers.take(0.1) is None
        again = results(workers, jobs[:1])
        assert not set(workers.pids) & set(pids)
    for number, result in found.items():
        kind = VIDEOS[number].partition("-")[0]
        assert (result.error is None) == (kind not in ("bad", "die"))
        assert result.warnings == (("3 frames are lost",) if kind == "torn" else ())
        if result.error is None:
            first, second = result.inputs
            assert torch.equal(first["ids"], torch.tensor([[len(VIDEOS[number]), 5]]))
            assert torch.equal(second["ids"], first["ids"]) and first["none"].shape == (0, 3)
    assert found[1].error == "not a video: bad-1.mp4"
    assert "died of SIGKILL" in found[2].error
    assert torch.equal(again[0].inputs[0]["ids"], found[0].inputs[0]["ids"])
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("lvspec.captioning.workers.time", self)

    def monotonic(self):
        return self.now


def wait_until_it_hangs(workers, path):
    """Nobody gives it up before its time, and what the others prepare is returned."""
    found = []
    while not path.exists():
        found.append(workers.take(0.1))
    return [each for each in found if each is not None]


def test_who_hangs_costs_its_clip_alone(monkeypatch, tmp_path):
    """The clock of a clip begins when the process begins with it, whatever was before."""
    clock, path = Clock(monkeypatch), tmp_path / "hang-1.mp4"
    videos = ["a.mp4", str(path), "b.mp4"]
    with Workers(Recipe(), 1, ahead=2, timeout=5.0) as workers:
        workers.give(Job(0, "a.mp4", "what?"))
        clock.now = 99.0  # which it takes to start
        first = taken(workers)
        (pid,) = workers.pids
        for number in (1, 2):
            workers.give(Job(number, videos[number], "what?"))
        clock.now = 104.0
        assert wait_until_it_hangs(workers, path) == [] and workers.pids == [pid]
        clock.now = 104.1
        second = workers.take(0)
        assert pid not in workers.pids
        third = taken(workers)
        assert workers.outstanding == 0
    assert [each.number for each in (first, second, third)] == [0, 1, 2]
    assert second.error == "worker: expected an answer within 5 s, got none (it was killed)"
    assert first.error is third.error is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_who_hangs_before_it_begins(monkeypatch, tmp_path):
    """A process has ten minutes to load what it needs."""
    clock, path = Clock(monkeypatch), tmp_path / "loading"
    with Workers(Stuck(str(path)), 1, ahead=1, timeout=5.0) as workers:
        workers.give(Job(0, "a.mp4", "what?"))
        clock.now = 599.0
        assert wait_until_it_hangs(workers, path) == []
        clock.now = 601.0
        assert "within 600 s, got none" in workers.take(0).error
        assert workers.outstanding == 0 and workers.pids == []


@pytest.mark.slow
def test_who_cannot_be_killed_is_left(monkeypatch, tmp_path):
    """As one that waits for a dead network file system: nobody waits for it in turn."""
    clock, path = Clock(monkeypatch), tmp_path / "hang-1.mp4"
    kill = _Child.kill
    monkeypatch.setattr(_Child, "kill", lambda process: None)
    monkeypatch.setattr("lvspec.captioning.workers._FAREWELL", 0.1)
    with Workers(Recipe(), 1, ahead=1, timeout=5.0) as workers:
        workers.give(Job(0, "a.mp4", "what?"))
        taken(workers)
        workers.give(Job(1, str(path), "what?"))
        assert wait_until_it_hangs(workers, path) == []
        clock.now = 6.0
        assert "got none" in workers.take(0).error and workers.pids == []
    (left,) = multiprocessing.active_children()
    left.join()
    assert left.is_alive()
    kill(left)
    multiprocessing.process.BaseProcess.join(left)


@pytest.mark.slow
def test_what_cannot_be_loaded_is_each_clips_error():
    with Workers(Unloadable(), 1, ahead=1) as workers:
        found = results(workers, [Job(0, "a.mp4", "what?"), Job(1, "b.mp4", "what?")])
    assert {each.error for each in found.values()} == {"ImportError: expected torchvision"}


def test_no_more_is_asked_for_than_there_is_room(monkeypatch):
    monkeypatch.setattr("lvspec.captioning.workers._Process", _Nobody)
    workers = Workers(Recipe(), 2, ahead=3)
    given = 0
    while workers.wants_more:
        workers.give(Job(given, "a.mp4", "what?"))
        given += 1
    assert given == 2 * 2 + 3 == workers.outstanding


class _Nobody:
    """A process that never answers."""

    def __init__(self, recipe):
        self.jobs = []

    def give(self, job):
        self.jobs.append(job)
