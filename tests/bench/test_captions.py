"""A million captions on paper (bench/paper/captions.py), by hand and as a document."""

import json
import sys
from dataclasses import replace

import pytest


@pytest.fixture(scope="module")
def limits(bench):
    return bench("limits")


@pytest.fixture(scope="module")
def paper(bench):
    return bench("paper.captions")


@pytest.fixture
def setting(limits, paper):
    """Bandwidth that is no limit, and as many operations a second as towers and prompts get."""
    gpu = limits.Gpu("unit", bandwidth=1e30, memory=1e15, flops=1e12 / paper.REACHED)
    fields = {"context": 1000, "gap": 0.0, "reduction": 0.0, "draft_gpus": 1}
    return limits.Setting(limits.QWEN_7B, limits.QWEN_3B, gpu, **fields)


def operations(limits, shape, tokens):
    """Two for every weight of the layers that a token meets, and for the pairs that it sees."""
    weights = limits.parameters(shape)[0] - shape.vocabulary * shape.hidden_size
    pairs = tokens * tokens / 2
    return 2 * weights * tokens + shape.num_layers * 2 * 2 * pairs * shape.hidden_size


def test_stages_by_hand(limits, paper, setting):
    clip = paper.Clip(prompt=1000, new_tokens=100, cpu_seconds=6.0, workers=3)
    found = paper.stages(setting, clip, batches=(1,))
    tower = 2 * 0.63e9 * 4 * 1000 / 1e12
    seven, three = (operations(limits, s, 1000) / 1e12 for s in (setting.target, setting.draft))
    assert found.cpu == 2.0 and found.vision == pytest.approx(2 * tower)
    assert found.prefill == pytest.approx(seven + three)
    best = limits.limit(setting)
    assert found.decoding == pytest.approx(10 * best.iteration_ms / 1e3)
    alone = paper.stages(setting, clip, drafts=False, batches=(1,))
    assert alone.vision == pytest.approx(tower) and alone.prefill == pytest.approx(seven)
    assert alone.decoding == pytest.approx(100 * best.autoregression_ms / 1e3)
    both = replace(setting, gpus=2)
    shared = paper.stages(both, clip, drafts=False, batches=(1,))
    summed = 2 * 28 * 2 * 1000 * 3584 / paper.LINK
    assert shared.prefill == pytest.approx(seven / 2 + summed) and shared.cpu == 1.0
    assert shared.vision == alone.vision, "a tower is not divided"


def test_what_limits(paper):
    """The CPUs where they are slower than all of the device's work, or its longest part."""
    found = paper.Stages(cpu=2.0, vision=0.5, prefill=1.0, decoding=0.4, batch=8)
    assert found.limited_by == "video on CPUs" and found.seconds == 2.0
    found = replace(found, cpu=1.8)
    assert found.limited_by == "prefill" and found.seconds == pytest.approx(1.9)


def test_the_fastest_batch_that_fits(limits, paper, setting):
    clip = paper.Clip(prompt=16384)
    setting = replace(setting, gpu=limits.GPUS["h200"], context=16384)
    assert paper.stages(setting, clip).batch == 32
    small = replace(setting, gpu=replace(setting.gpu, memory=40e9))
    assert 1 < paper.stages(small, clip).batch < 32


def test_draft_keep(limits, setting):
    """Of the caches only the draft's is smaller."""
    setting = replace(setting, gpu=replace(setting.gpu, bandwidth=1.0, flops=1e30), gamma=1)
    whole, part = (limits.limit(replace(setting, draft_keep=x)) for x in (1.0, 0.25))
    fewer = 750 * limits.kv_bytes(setting.draft)
    assert whole.draft_bytes - part.draft_bytes == fewer
    assert whole.iteration_ms - part.iteration_ms == pytest.approx(1e3 * fewer)
    assert whole.target_bytes == part.target_bytes


def test_groups(limits, paper):
    """As few GPUs as take a pair; with one alone the weights of the largest are fp8."""
    clip, gpu = paper.Clip(), limits.GPUS["h200"]
    of = limits.Setting(limits.QWEN_72B, limits.QWEN_7B, gpu)
    assert paper.fitting(of, clip, paper.Fleet(8, gpu)).gpus == 2
    alone = paper.fitting(of, clip, paper.Fleet(1, gpu))
    assert alone.gpus == 1 and alone.weight_bytes == (1.0, 2.0)
    assert paper.fitting(of, clip, paper.Fleet(8, gpu, gpus=4)).gpus == 4
    with pytest.raises(ValueError, match="expected a pair that fits into 1 x a100"):
        paper.fitting(of, clip, paper.Fleet(1, replace(limits.GPUS["a100"], memory=40e9)))


def run(limits, monkeypatch, path, *options):
    command = ["limits.py", "--captions", "--json", str(path), *map(str, options)]
    monkeypatch.setattr(sys, "argv", command)
    assert limits.main() == 0
    return json.loads(path.read_text())


def test_a_million(bench, limits, tmp_path, monkeypatch, capsys):
    """Pairs and fleets; what the document says is printed and stands in a table."""
    document = run(limits, monkeypatch, tmp_path / "captions.json")
    assert [row["fleet"] for row in document["rows"]] == 3 * [1, 8, 256]
    for one, eight, many in zip(*[iter(document["rows"])] * 3):
        assert one["hours"] >= 4 * eight["hours"] == pytest.approx(4 * 32 * many["hours"])
        assert eight["stages"]["prefill"] + eight["stages"]["decoding"] > 0
        assert 1 < one["one_decoding_speedup"] > one["one_speedup"]
    said = capsys.readouterr().out
    assert said.count("qwen2.5-vl-72b (fp8) <- qwen2.5-vl-7b") == 1
    (table,) = (bench("report").captions_table([document])[-1:],)
    assert table[0].startswith("| qwen2.5-vl-72b <- qwen2.5-vl-7b | 256 | 2 |")
    few = run(limits, monkeypatch, tmp_path / "few.json", "--decode-workers", 1, "--fleet", 8)
    assert few["rows"][0]["limited_by"] == "video on CPUs"
    part = run(limits, monkeypatch, tmp_path / "part.json", "--draft-keep", 0.1, "--fleet", 8)
    assert part["rows"][1]["stages"]["decoding"] < document["rows"][4]["stages"]["decoding"]


def test_captions_that_are_committed(bench, limits, tmp_path, monkeypatch):
    """As the script says them now."""
    path = bench("pairs.expected").PREDICTIONS.with_name("captions.json")
    committed = json.loads(path.read_text())
    document = run(limits, monkeypatch, tmp_path / "captions.json")
    assert json.dumps(committed["rows"]) == json.dumps(document["rows"])
