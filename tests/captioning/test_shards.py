"""Rows on the disk: one an id in the end, whatever happened on the way."""

import json

import pytest

from lvspec.captioning.meter import Meter
from lvspec.captioning.rows import Settings
from lvspec.captioning.shards import Shard, ShardFiles, lines_of, part_of
from lvspec.captioning.status import Progress, status
from lvspec.evaluation.samples import Sample

SETTINGS = Settings({"target": "big", "policy": {"name": "lvspec"}}, "abc")


def row(name, error=None, **other):
    tokens = None if error else [1, 2]
    values = {"id": name, "video": f"{name}.mp4", "prompt": "what?", "caption": None}
    numbers = {"tau": None, "regret": None, "seconds": None}
    return {
        **values,
        "tokens": tokens,
        **numbers,
        "warnings": [],
        "error": error,
        "settings": "abc",
        **other,
    }


@pytest.fixture
def files(tmp_path):
    """`files()`: those of the only shard, opened."""
    return lambda settings=SETTINGS: ShardFiles(tmp_path, Shard(), settings)


def ids(path):
    return [found["id"] for _, found in lines_of(path)]


def test_a_shard_is_closed_with_the_newest_row_of_every_id(files, tmp_path):
    with files() as one:
        one.add(row("a"))
        one.add(row("b", "broken"))
    assert not one.path.exists() and part_of(one.path).exists()
    with files() as two:
        assert {k: v.error for k, v in two.known.items()} == {"a": None, "b": "broken"}
        two.add(row("b", caption="née"))
        two.close(parquet=False)
        assert two.is_closed
    assert ids(two.path) == ["a", "b"] and not part_of(two.path).exists()
    before = two.path.read_bytes()
    with files() as three:  # a video more: the whole file stands until it is replaced
        assert three.is_closed and three.known["b"].error is None
        three.add(row("c"))
        assert three.path.read_bytes() == before
    with files() as four:
        assert sorted(four.known) == ["a", "b", "c"]
        four.add(row("a", caption="another"))
        four.close(parquet=False)
    assert ids(four.path) == ["b", "c", "a"]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_whoever_dies_between_the_whole_file_and_its_journal_loses_nothing(files):
    with files() as one:
        one.add(row("a"))
        one.add(row("b"))
        journal = part_of(one.path).read_bytes()
        one.close(parquet=False)
    part_of(one.path).write_bytes(journal)
    with files() as two:
        two.close(parquet=False)
    assert ids(two.path) == ["a", "b"]


def test_a_folder_opened_for_nothing_stays_closed(files):
    with files() as one:
        one.add(row("a"))
        one.close(parquet=False)
    with files():
        pass
    assert not part_of(one.path).exists()


def test_other_settings_are_refused_for_every_shard(files, tmp_path):
    with files():
        pass
    other = Settings({"target": "big", "policy": {"name": "strict"}}, "def")
    with pytest.raises(ValueError, match=r"^policy\.name: expected 'lvspec', with which"):
        ShardFiles(tmp_path, Shard(2, 2), other)
    with files() as one, pytest.raises(OSError, match="no other run"):
        files()
    assert one.known == {}


def test_a_closed_shard_as_a_table(files):
    parquet = pytest.importorskip("pyarrow.parquet")
    with files() as one:
        one.add(row("a", caption="née", tau=3.5))
        one.add(row("b\udc80", "broken"))
        one.close(parquet=True)
    table = parquet.read_table(one.path.with_suffix(".parquet")).to_pylist()
    assert [each["id"] for each in table] == ["a", "b?"]
    assert table[0]["caption"] == "née" and table[0]["tau"] == 3.5 and table[0]["tokens"] == [1, 2]
    assert table[1]["error"] == "broken" and table[1]["tokens"] is None
    with files() as two:  # a table of fewer rows does not stay beside the file
        two.add(row("c"))
        two.close(parquet=False)
    assert not two.path.with_suffix(".parquet").exists()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shards_are_by_id_alone(count):
    """Of names that differ in a digit, too, every part has its share."""
    samples = [Sample(f"clips/{index}.mp4", "x", "what?") for index in range(200)]
    shards = [Shard(index, count) for index in range(1, count + 1)]
    parts = [[s.id for s in samples if shard.has(s)] for shard in shards]
    assert sorted(sum(parts, [])) == sorted(s.id for s in samples)
    assert all(0.5 < len(part) * count / 200 < 1.6 for part in parts)


def test_status_counts_ids(files, tmp_path):
    with pytest.raises(ValueError, match="expected a folder of lvspec caption"):
        status(tmp_path)
    meter = Meter(2)
    Progress(tmp_path, Shard(), 5, meter).write()
    with files() as one:
        one.add(row("a"))
        one.add(row("b", "broken"))
        one.add(row("b"))
        one.add(row("c", "broken"))
        (found,) = status(tmp_path)
        assert (found.done, found.failed, found.left, found.state) == (2, 1, 2, "running")
    with open(part_of(one.path), "ab") as file:
        file.write(b'{"id": "d", "err')  # torn
    (found,) = status(tmp_path)
    assert (found.done, found.failed, found.left, found.state) == (2, 1, 2, "stopped")
    with files() as two:
        two.close(parquet=False)
    assert status(tmp_path)[0].state == "closed"
    ShardFiles(tmp_path, Shard(2, 3), SETTINGS).__exit__(None, None, None)
    states = {each.shard: each.state for each in status(tmp_path)}
    assert states[Shard(2, 3)] == "stopped" and states[Shard(3, 3)] == "not begun"
    assert json.loads((tmp_path / "settings.json").read_text())["digest"] == "abc"


def test_a_meter_names_the_stage_that_others_wait_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lvspec.captioning.meter.time.perf_counter", lambda: now[0])

    def spent(seconds, *, under_way, is_short):
        now[0] += seconds
        meter.advance(under_way, is_short=is_short)

    meter = Meter(4)
    spent(9, under_way=0, is_short=True)  # processes start: the clock does not run yet
    meter.begin()
    spent(9, under_way=4, is_short=False)
    assert meter.limit == "model-bound" and meter.to_dict()["idle"] == 0
    spent(1, under_way=0, is_short=True)
    assert meter.to_dict()["idle"] == 0.1 == meter.to_dict()["empty"]
    spent(2, under_way=1, is_short=True)
    assert meter.limit == "decode-bound: add workers"
    assert meter.to_dict()["empty"] == round(2.5 / 12, 4)
    spent(88, under_way=4, is_short=False)
    meter.wrote(11.0)
    assert meter.limit == "write-bound: a faster disk"
