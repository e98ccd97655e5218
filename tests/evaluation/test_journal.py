"""Journals: nothing that was added is lost, and nothing of others is touched."""

import json
import os
import subprocess
import sys

import pytest

from lvspec.environment import NotWritten
from lvspec.evaluation.journal import Journal

SETTINGS = {"target": "big", "policy": {"name": "lvspec", "top_k": 5}, "methods": ["strict"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


def journal(path, settings=SETTINGS, kind="evaluation"):
    return Journal(path, kind, settings)


def test_it_goes_on(path):
    with journal(path) as one:
        one.add({"id": "a", "seconds": float("nan"), "text": "née \N{SNOWMAN}\n"})
    with journal(path) as other:
        assert other.records == [{"id": "a", "seconds": None, "text": "née \N{SNOWMAN}\n"}]
        other.add({"id": "b"})
        assert [record["id"] for record in other.records] == ["a", "b"]
    first, *rest = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first == {"lvspec": "evaluation", "version": 1, "settings": SETTINGS}
    assert [record["id"] for record in rest] == ["a", "b"]


def test_a_reader_gets_what_is_not_kept(path):
    with journal(path) as one:
        one.add({"id": "a"})
    found = []
    with Journal(path, "evaluation", SETTINGS, reader=found.append) as other:
        other.add({"id": "b"})
        assert found == [{"id": "a"}, {"id": "b"}] and other.records == []


def test_torn_at_every_byte(path):
    """Whatever was cut off, what stands whole before it is read and the next record follows it."""
    with journal(path, {}) as one:
        one.add({"id": "a"})
        one.add({"id": "b", "text": "née"})
    whole = path.read_bytes()
    lines = whole.count(b"\n")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = max(whole[:length].count(b"\n") - 1, 0)
        with journal(path, {}) as again:
            assert [record["id"] for record in again.records] == ["a", "b"][:kept]
            again.add({"id": "c"})
        assert path.read_bytes().count(b"\n") == kept + 2 <= lines + 1
        assert json.loads(path.read_bytes().splitlines()[-1]) == {"id": "c"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "target": "other"}, 'target: expected "big", with which .* got "other"'),
        ({**SETTINGS, "policy": {"name": "lvspec", "top_k": 4}}, r"policy\.top_k: expected 5, "),
        ({**SETTINGS, "gamma": 12}, "gamma: expected none, with which .*, got 12"),
        ({"target": "big", "policy": SETTINGS["policy"]}, r'methods: expected \["strict"\], '),
    ],
)
def test_other_settings_are_refused(path, settings, message):
    with journal(path) as one:
        one.add({"id": "a"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^{message}"):
        journal(path, settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a shopping list\nbread\nno newline", "expected a file of lvspec evaluation, got another"),
        ("no newline", "expected a file of lvspec, got another"),
        ('{"lvspec": "profile", "version": 1}\n', "expected a file of lvspec evaluation, got one"),
        ('{"lvspec": "evaluation", "version": 2}\n{', "expected version 1, got 2"),
    ],
)
def test_other_files_are_left_alone(path, content, message):
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        journal(path)
    assert path.read_text() == content


def test_a_damaged_line_is_named(path):
    with journal(path) as one:
        one.add({"id": "a"})
        one.add({"id": "b"})
    path.write_text(path.read_text().replace('{"id": "a"}', '{"id": "a'))
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2: expected a record"):
        journal(path)


def test_two_runs_with_one_file(path):
    with journal(path), pytest.raises(OSError, match="no other run is writing"):
        journal(path)
    journal(path).close()


def test_a_full_disk_leaves_whole_lines(path, monkeypatch):
    with journal(path) as one:
        one.add({"id": "a"})
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))
        with pytest.raises(NotWritten, match="expected a file that can be written"):
            one.add({"id": "b"})
        monkeypatch.undo()
        one.add({"id": "c"})
    with journal(path) as again:
        assert again.records == [{"id": "a"}, {"id": "c"}]


def test_killed_in_the_midst(path):
    """SIGKILL while it writes: all that was added before is there."""
    script = (
        "import sys\nfrom lvspec.evaluation.journal import Journal\n"
        f"journal = Journal({str(path)!r}, 'evaluation', {SETTINGS!r})\n"
        "for number in range(10**9):\n"
        "    journal.add({'number': number, 'text': 'x' * 5000})\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        said = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        said += [int(line) for line in process.stdout.read().split()]
    with journal(path) as again:
        numbers = [record["number"] for record in again.records]
    assert numbers[: len(said)] == said and numbers == list(range(len(numbers)))
