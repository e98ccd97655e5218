"""bench/e2e.py and what it is made of: the same code as on a GPU, at small sizes on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig
from lvspec.engine.graph import WARM_UP, IterationRunner
from lvspec.models.cache import SlotCache

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 80

pytestmark = pytest.mark.slow


def run(*command):
    """A script of bench/ in the root, as a user runs it."""
    dropped = ("LVSPEC_BACKEND", "TRITON_INTERPRET", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    command = [sys.executable, *(str(part) for part in command)]
    env["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def tiny(bench):
    """(target, draft): the tiny pair's models, float32."""
    pair = bench("pairs.pairs").PAIRS["tiny"]
    build = bench("pairs.random_models").build
    cpu = torch.device("cpu")
    return tuple(build(shape, cpu, torch.float32) for shape in (pair.target, pair.draft))


@pytest.fixture
def begin(bench, tiny):
    """`begin(trace=..., batch_size=..., draft=..., **fields)`: an engine behind its prompts."""

    def make(*, trace=None, batch_size=1, draft=True, policy=None, **fields):
        config = DecodeConfig(**{"gamma": 6, "max_new_tokens": 150, "eos_ids": (), **fields})
        models = (tiny[0], tiny[1] if draft is True else draft)
        options = {"context": CONTEXT, "batch_size": batch_size, "trace": trace, "policy": policy}
        with torch.inference_mode():
            return bench("pairs.replay").begin(*models, config, **options)

    return make


def iterate(engine, count):
    with torch.inference_mode(), engine.attention():
        for _ in range(count):
            engine.iterate()


# Models


@pytest.mark.parametrize(
    "name, vocabulary",
    [
        ("QWEN_3B", 151936),
        ("QWEN_7B", 152064),
        ("QWEN_32B", 152064),
        # HF's converter: Qwen2's vocabulary and two tokens, padded to a multiple of 64.
        ("LLAVA_05B", 152000),
        ("LLAVA_7B", 152128),
        ("LLAVA_72B", 152128),
    ],
)
def test_bytes_are_those_of_the_real_classes(bench, name, vocabulary):
    """What limits.py counts by hand is what HF's class has, built without memory."""
    shape, limits = getattr(bench("ops.cases"), name), bench("limits")
    assert shape.vocabulary == vocabulary
    meta = torch.device("meta")
    model = bench("pairs.random_models").build(shape, meta, torch.bfloat16)
    text, head = model.model.language_model, model.lm_head
    weights = {*text.parameters(), *head.parameters()}
    held = sum(weight.numel() for weight in weights)
    is_tied = head.weight is text.embed_tokens.weight
    assert is_tied == shape.tied
    read = held - (0 if is_tied else text.embed_tokens.weight.numel())
    assert limits.parameters(shape) == (read, held)
    cache = SlotCache(
        text.config, batch_size=1, capacity=3, num_slots=1, dtype=torch.bfloat16, device=meta
    )
    assert limits.kv_bytes(shape) == (cache.k[..., 0, :].nbytes + cache.v[..., 0, :].nbytes)


def test_a_cut_model_says_so(bench):
    cases = bench("ops.cases")
    cut = cases.LLAVA_72B.with_layers(40)
    assert cut.label == "llava-onevision-72b (40 of 80 layers)" and cut.num_layers == 40
    assert cut.with_layers(20).label.endswith("(20 of 80 layers)")
    assert cases.LLAVA_72B.label == "llava-onevision-72b"


def test_random_prompts(begin):
    """The same for the same sequence, different from one to the next, a video in the middle."""
    one, two = begin(batch_size=2), begin(batch_size=2, draft=None)
    assert one.cache.k[..., :CONTEXT, :].equal(two.cache.k[..., :CONTEXT, :])
    assert not one.cache.k[:, 0].equal(one.cache.k[:, 1])
    assert not one.cache.k.equal(one.cache.v) and one.cache.k[..., :CONTEXT, :].std() > 0.9
    assert one.cache.visual[0].sum() == CONTEXT - 55 and one.drafter.cache.kv_len[0] == CONTEXT


def test_a_prompt_must_have_room(bench):
    with pytest.raises(ValueError, match="context: expected at least 56 tokens, got 55"):
        bench("pairs.random_models").random_prompt(55, 100, torch.device("cpu"), seed=0)


# Replayed acceptance


def test_traces(bench):
    trace = bench("pairs.replay").AcceptanceTrace
    half = trace.synthetic(3.5)
    assert half.tau == 3.5 and set(half.num_accepted) == {2, 3}
    assert set(trace.synthetic(1).num_accepted) == {0}
    with pytest.raises(ValueError, match="tau: expected a number >= 1, got 0.5"):
        trace.synthetic(0.5)
    with pytest.raises(ValueError, match="trace: expected one of lvspec, strict, got 'fly'"):
        trace.stored("fly")
    recorded = json.loads((ROOT / "bench/traces/embedded-gamma12.json").read_text())
    for name, least in (("lvspec", 10), ("strict", 3.5)):
        found = trace.stored(name)
        assert found.tau == pytest.approx(recorded["traces"][name]["tau"]) and found.tau > least
        assert max(found.num_accepted) <= recorded["gamma"]


def test_spine(bench):
    spine_of = bench("pairs.replay").spine_of
    assert spine_of([-1, 0, 1, 2]) == (0, 1, 2, 3)
    assert spine_of([-1, 0, 0, 2, 1, 3]) == (0, 2, 3, 5)
    assert spine_of([-1]) == (0,)


@pytest.mark.parametrize("tree", [None, "specvlm"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_a_trace_says_is_accepted(bench, begin, batch_size, tree, monkeypatch):
    """Output and lengths are the trace's, the tokens the draft's; the accept operation ran."""
    accept, calls = sys.modules["lvspec.phases.accept"].ops.accept, []
    monkeypatch.setattr(
        sys.modules["lvspec.phases.accept"].ops,
        "accept",
        lambda *a, **k: calls.append(1) or accept(*a, **k),
    )
    trace = bench("pairs.replay").AcceptanceTrace("by hand", (4, 0, 2, 9))
    engine = begin(trace=trace, batch_size=batch_size, tree=tree)
    deepest = 5 if tree else 6
    assert engine.replayed(3, 2)[:, 0].tolist() == [deepest, 4]
    iterate(engine, 1)
    with torch.inference_mode(), engine.attention():
        done = engine.run_phases()
    first = engine.replayed(0, 2)
    assert (engine.state.num_out - 1).tolist() == (first + 1).sum(0).tolist()
    assert (engine.cache.kv_len - CONTEXT).tolist() == (first + 1).sum(0).tolist()
    assert len(calls) == 2
    if batch_size == 3:
        assert len(set(map(tuple, first.T.tolist()))) > 1  # not in step
    for place in range(batch_size):
        count = int(done.acceptance.num_accepted[place])
        path = done.acceptance.path[place, : count + 1].long()
        assert (done.acceptance.path[place, count + 1 :] == -1).all()
        end = int(engine.state.num_out[place])
        emitted = engine.state.out_ids[place, end - count - 1 : end]
        assert emitted[:-1].equal(done.draft.tokens[place, path[1:]])
        assert int(emitted[-1]) == int(done.wanted[place, path[-1]])


def test_replaying_can_be_captured(bench, begin):
    """By the tape that stands for a CUDA graph, which refuses reads of the device."""
    path = Path(__file__).with_name("test_graph.py")
    spec = importlib.util.spec_from_file_location("graph_tests", path)
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    trace = bench("pairs.replay").AcceptanceTrace.stored("lvspec")
    for tree in (None, "specvlm"):
        engines = [begin(trace=trace, batch_size=2, capture=False, tree=tree) for _ in range(2)]
        tape = tests.TapeCapturer()
        engines[0].runner = IterationRunner(tape)
        engines[0].drafter._may_look = False  # as where there is no CPU to look
        for engine in engines:
            iterate(engine, 7)
        assert (tape.captures, tape.replays) == (1, 7 - WARM_UP)
        assert engines[0].runner.description == "graph"
        mine, theirs = (engine.state for engine in engines)
        assert mine.num_out.equal(theirs.num_out)
        count = int(mine.num_out.min())
        assert mine.out_ids[:, :count].equal(theirs.out_ids[:, :count])


# Peers


def test_specvlm_style_step_gives_the_targets_tokens(bench, begin, tiny):
    """Strict acceptance: with a draft that is the target it accepts whole paths, too."""
    hf, models = bench("pairs.huggingface"), bench("pairs.random_models")
    alone = begin(draft=None)
    iterate(alone, 20)
    wanted = alone.state.out_ids[0, 1:21].tolist()
    for draft, passes in ((tiny[1], 20), (tiny[0], 4)):
        engine = begin(draft=draft, policy=AcceptancePolicy.strict())
        target, drafter = (models.RandomPromptModel(m, "target") for m in (tiny[0], draft))
        caches = (
            hf.dynamic_cache(target, engine.cache, CONTEXT),
            hf.dynamic_cache(drafter, engine.drafter.cache, CONTEXT),
        )
        root = engine.state.last_two[:, 1:].clone()
        step = bench("pairs.specvlm_step").SpecVLMStep(target, drafter, *caches, root)
        with torch.inference_mode(), step.attention():
            added = [len(step.run()) for _ in range(passes)]
        assert step.output[:20] == wanted[: len(step.output)]
        assert sum(added) == len(step.output) >= (20 if draft is tiny[1] else 4 * 6)
        assert target.text.config._attn_implementation != "eager"


@pytest.mark.parametrize("is_static", [False, True])
def test_huggingface_goes_on_behind_our_prompt(bench, begin, tiny, is_static):
    """HF's greedy tokens over a copy of the cache are our autoregression's, and each is timed."""
    hf, engine = bench("pairs.huggingface"), begin(draft=None, batch_size=2)
    model, length = engine.target, CONTEXT
    prompts = [sequence.request.prompt for sequence in engine.places]
    ids = torch.cat([torch.cat(prompts), engine.state.out_ids[:, :1]], dim=1)

    def cache():
        if is_static:
            return hf.static_cache(model, engine.cache, length, length + 20)
        return hf.dynamic_cache(model, engine.cache, length)

    with torch.inference_mode():
        theirs = hf.greedy(tiny[0], ids, cache(), 9)
        seconds = hf.token_seconds(tiny[0], ids, cache(), 5, skip=2)
    iterate(engine, 9)
    assert theirs.equal(engine.state.out_ids[:, 1:10])
    assert len(seconds) == 5 and min(seconds) > 0


def test_rounds_of_assisted_generation(bench, tiny):
    """Told apart by the clock; the tokens are greedy decoding's, vocabularies may differ."""
    hf, pairs = bench("pairs.huggingface"), bench("pairs.pairs").PAIRS["tiny"]
    assert pairs.target.vocabulary != pairs.draft.vocabulary
    ids = bench("pairs.random_models").random_prompt(CONTEXT, 1000, torch.device("cpu"), seed=0)
    with torch.inference_mode():
        seconds, tokens = hf.assisted_rounds(*tiny, ids, gamma=4, count=3)
        assert tokens.equal(hf.greedy(tiny[0], ids, None, tokens.shape[1]))
    assert len(seconds) == 3 and min(seconds) > 0
    assert tiny[1].config.get_text_config().vocab_size == pairs.draft.vocabulary


# Rows


@pytest.fixture
def row(bench, tiny):
    """`row(batch_size)`: the tiny pair, ready to be measured."""
    rows, pairs = bench("pairs.row"), bench("pairs.pairs")
    trace = bench("pairs.replay").AcceptanceTrace.synthetic(4.0)

    def make(batch_size=1):
        plan = rows.Plan.of(DecodeConfig(gamma=5), trace, 3)
        return rows.Row(*tiny, pairs.PAIRS["tiny"], pairs.Size(CONTEXT, batch_size), plan)

    return make


def test_a_row_has_every_method_its_limit_and_what_follows(bench, row):
    measure, timing = bench("pairs.measure"), bench("measuring.timing")
    made = row()
    found = measure.measure_row(made, measure.Budget(1000))
    methods = found["methods"]
    assert list(methods) == list(measure.METHODS)
    assert methods["hf static, compiled"] == {"not_measured": "HF compiles on CUDA only"}
    bandwidth = timing.copy_bandwidth(torch.device("cpu"))
    for name, method in methods.items():
        if name == "hf static, compiled":
            continue
        assert 0 < method["p20_ms"] <= method["median_ms"] <= method["p80_ms"], name
        if name in measure.OURS:
            assert method["limit_ms"] == pytest.approx(1e3 * method["bytes"] / bandwidth)
            share = method["limit_ms"] / method["wall_ms"]
            assert method["share_of_limit"] == pytest.approx(share)
            assert method["loop"].startswith("eager: ")
            assert method["parts"]["target"].keys() >= {"layers", "called"}
    ours, alone = methods["lvspec"], methods["autoregression"]
    assert ours["tokens_per_iteration"] == 4 and alone["tokens_per_iteration"] == 1
    assert found["speedup"] == pytest.approx(4 * alone["wall_ms"] / ours["wall_ms"])
    # The bytes by hand: one pass of the target, five of the draft, with the cache so far.
    limits, pair, item = bench("limits"), made.pair, 4
    passes = ((pair.target, 1), (pair.draft, 5))
    total = sum(
        count * (limits.parameters(s)[0] * item + ours["mean_context"] * limits.kv_bytes(s, item))
        for s, count in passes
    )
    assert ours["bytes"] == pytest.approx(total)
    assert ours["mean_context"] == CONTEXT + 4 * bench("pairs.row").WARM_UP + 4 * 3 / 2
    assert set(found["checks"]) == {"logits", "autoregression", "captured"}


def test_a_batch_leaves_out_peers_of_one_sequence(bench, row):
    measure = bench("pairs.measure")
    methods = measure.measure_row(row(batch_size=2), measure.Budget(1000))["methods"]
    for name in ("hf assisted", "specvlm step"):
        assert methods[name] == {"not_measured": "takes one sequence only"}
    assert "wall_ms" in methods["hf generate"] and "wall_ms" in methods["lvspec"]


def test_wrong_results_are_not_timed(bench, row, monkeypatch):
    """Each check refuses, says what was expected, and stops no other method."""
    measure, hf = bench("pairs.measure"), bench("pairs.huggingface")
    made = row()
    original = made.run_ours

    def spoiled(name, engine):
        found = original(name, engine)
        if name == "lvspec":
            made.first_tokens[name][0, 3] += 1
        return found

    monkeypatch.setattr(made, "run_ours", spoiled)
    monkeypatch.setattr(hf, "greedy", lambda model, ids, cache, count, **_: ids[:, :count])
    methods = measure.measure_row(made, measure.Budget(1000))["methods"]
    said = methods["lvspec eager"]["not_measured"]
    assert said.startswith("wrong: captured and eager loops differ from token 3 of")
    assert methods["autoregression"]["not_measured"].startswith("wrong: expected HF's greedy")
    assert "wall_ms" in methods["lvspec, specvlm tree"]


def test_wrong_logits_are_refused(bench, row, monkeypatch):
    hf = bench("pairs.huggingface")
    dynamic = hf.dynamic_cache

    def other(*arguments):
        found = dynamic(*arguments)
        found.layers[0].values[..., 5, :] += 1
        return found

    made = row()
    engine = made.begin_alone()
    made._check_logits(engine)
    monkeypatch.setattr(hf, "dynamic_cache", other)
    with pytest.raises(bench("pairs.row").Wrong, match="logits: expected an error of at most"):
        made._check_logits(engine)


def test_a_trace_that_is_not_followed_is_refused(bench, row):
    made = row()
    engine = made.begin()
    engine.counts = engine.counts + 1
    with pytest.raises(bench("pairs.row").Wrong, match="lvspec: expected .* tokens, got 4.0"):
        made.run_ours("lvspec", engine)


def test_a_method_that_fails_says_why(bench, row, monkeypatch):
    measure = bench("pairs.measure")

    def fails(made):
        raise RuntimeError("no kernel\nand more")

    def too_large(made):
        raise torch.OutOfMemoryError("CUDA out of memory")

    methods = {
        "lvspec": fails,
        "hf generate": too_large,
        "autoregression": measure.Row.autoregression,
    }
    monkeypatch.setattr(measure, "METHODS", methods)
    found = measure.measure_row(row(), measure.Budget(1000))
    assert found["methods"]["lvspec"] == {"not_measured": "RuntimeError: no kernel"}
    assert found["methods"]["hf generate"] == {"not_measured": "out of memory"}
    assert "wall_ms" in found["methods"]["autoregression"] and "speedup" not in found
    found = measure.measure_row(row(), measure.Budget(-1))
    assert all(m == {"not_measured": "out of time"} for m in found["methods"].values())


def interrupted(made):
    raise KeyboardInterrupt


def test_an_interrupt_loses_one_method(bench, row, monkeypatch):
    """What was measured before it was saved; the rest is measured by the next call, alone."""
    measure, known, saved = bench("pairs.measure"), {}, []
    monkeypatch.setitem(measure.METHODS, "lvspec eager", interrupted)
    save = lambda: saved.append(json.loads(json.dumps(known)))
    with pytest.raises(KeyboardInterrupt):
        measure.measure_row(row(), measure.Budget(1000), measure.OURS, known, save)
    first = saved[-1]["methods"]
    assert "wall_ms" in first["lvspec"] and "wall_ms" in first["autoregression"]
    assert saved[-1]["speedup"] > 0 and "hf generate" not in first
    assert first["lvspec eager"] == first["lvspec, specvlm tree"] == {"not_measured": "not reached"}

    monkeypatch.setitem(measure.METHODS, "lvspec eager", measure.Row.lvspec_eager)
    names = ("lvspec", "lvspec eager", "specvlm step")
    found = measure.measure_row(row(), measure.Budget(1000), names, saved[-1])
    assert found["methods"]["lvspec"] == first["lvspec"]
    for name in names:
        assert "wall_ms" in found["methods"][name], found["methods"][name]
    assert found["checks"]["captured"].startswith("the eager loop's tokens")


def test_what_does_not_fit_is_left_out(bench):
    pairs = bench("pairs.pairs")
    pair, size = pairs.PAIRS["qwen-32b-7b"], pairs.Size(16384, 1)
    needed = pairs.needed_bytes(pair, size, tokens=0, itemsize=2)
    assert needed == pytest.approx(65.5e9 + 15.2e9 + 16384 * (262144 + 57344), rel=0.01)
    assert pairs.does_not_fit(needed, int(84e9)) == "needs 95 GB, has 84 GB"
    assert pairs.does_not_fit(needed, int(150e9)) is None
    assert pairs.free_bytes(torch.device("cpu")) > 2**20


def test_iterations_are_timed_by_events_on_cuda(bench, monkeypatch):
    """The host waits twice, before and behind all of them; a stand-in for CUDA's clock."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("event")
            self.at = float(len(said) ** 2)

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("wait"))
    call = lambda: said.append("call")
    wall, each = bench("measuring.clock").timed(call, 3, torch.device("cuda"))
    assert said == ["wait", "event", *["call", "event"] * 3, "wait"]
    assert each == [16.0 - 4, 36.0 - 16, 64.0 - 36] and wall > 0


# The script


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("e2e") / "e2e.json"
    options = ("--device", "cpu", "--pair", "tiny-llava", "--context", CONTEXT, "--batch", 1)
    options += ("--tau", 3, "--iterations", 3, "--no-peers", "--json", path)
    done = run("bench/e2e.py", "pairs", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replayed tau = 3.00 (synthetic)" in done.stdout
    return path


def test_the_script_writes_rows(document):
    found = json.loads(document.read_text())
    assert found["kind"] == "e2e" and found["limits"]["read_gb_per_s"] > 0
    assert {"commit", "torch", "device_name"} <= found["environment"].keys()
    (row,) = found["pairs"]
    assert row["label"].startswith("tiny llava (2 of 4 layers) <- ")
    assert row["replayed"] == "replayed tau = 3.00 (synthetic)"
    assert row["methods"]["lvspec"]["wall_ms"] > 0 and "hf generate" not in row["methods"]
    assert row["checks"]["autoregression"].startswith("HF's greedy tokens")


def test_limits_beside_measured_rows(bench, document):
    """Predicted from the bandwidth of the run: the limit of the row, and gaps."""
    limits, found = bench("limits"), json.loads(document.read_text())
    for comparison in limits.compare(found):
        method = found["pairs"][0]["methods"][comparison.what]
        assert comparison.measured_ms == method["wall_ms"]
        assert comparison.predicted_ms > 0.9 * method["limit_ms"]
        assert comparison.ratio == comparison.measured_ms / comparison.predicted_ms
    assert {c.what for c in limits.compare(found)} == {"lvspec", "autoregression"}
    done = run("bench/limits.py", "--measured", document)
    assert done.returncode == 0 and "autoregression" in done.stdout, done.stderr


def test_time_that_is_over(tmp_path):
    path = tmp_path / "e2e.json"
    options = ("--device", "cpu", "--pair", "tiny", "--context", CONTEXT, "--budget", 0)
    done = run("bench/e2e.py", "pairs", *options, "--json", path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["pairs"]
    assert [row["not_measured"] for row in rows] == ["out of time"] * 2
    assert "not measured: out of time" in done.stdout


def test_a_draft_of_fewer_bytes(bench, monkeypatch, tmp_path, capsys):
    """Its label says so, its limit counts what it reads; without torchao there is no row."""
    path = tmp_path / "e2e.json"
    common = ["--device", "cpu", "--pair", "tiny", "--context", str(CONTEXT), "--batch", "1"]
    common += ["--iterations", "2", "--no-peers", "--json", str(path)]

    def written(*options):
        monkeypatch.setattr(sys, "argv", ["e2e.py", "pairs", *common, *options])
        assert bench("e2e").main() == 0
        return json.loads(path.read_text())["pairs"][-1]  # behind what was there before

    whole, part = written(), written("--draft-vocab", "100")
    assert part["label"] == whole["label"] + " (100 ids)"
    saved = (1024 - 100) * 64 * 4
    assert whole["draft"]["pass_gb"] - part["draft"]["pass_gb"] == pytest.approx(saved / 1e9)
    bytes_read = [row["methods"]["lvspec"]["bytes"] for row in (whole, part)]
    assert bytes_read[0] - bytes_read[1] == pytest.approx(12 * saved)

    def missing(model, weights):
        raise ImportError("weights: expected torchao")

    monkeypatch.setattr(bench("e2e"), "quantize", missing)
    row = written("--draft-weights", "int8")
    assert row["label"].endswith(" (int8)") and row["not_measured"] == "weights: expected torchao"


def test_the_script_goes_on_behind_an_interrupt(bench, monkeypatch, tmp_path, capsys):
    """Peers come behind our methods of all rows; figures that are there stay, failures do not."""
    path, measure, begun = tmp_path / "e2e.json", bench("pairs.measure"), []

    def counted(name):
        def method(row):
            begun.append((name, row.size.context))
            if len(begun) == stop:
                raise KeyboardInterrupt
            if stop and len(begun) == 3:
                raise RuntimeError("another process has the memory")
            return {"wall_ms": float(len(begun))}

        return method

    for name in measure.METHODS:
        monkeypatch.setitem(measure.METHODS, name, counted(name))
    words = ["pairs", "--device", "cpu", "--pair", "tiny", "--batch", "1", "--json", str(path)]
    words += ["--context", "40", "50"]

    def call(*options):
        begun.clear()
        monkeypatch.setattr(sys, "argv", ["e2e.py", *words, *options])
        bench("e2e").main()
        return {row["context"]: row["methods"] for row in json.loads(path.read_text())["pairs"]}

    stop = 7
    with pytest.raises(KeyboardInterrupt):
        call()
    assert begun == [(name, context) for context in (40, 50) for name in measure.OURS][:7]
    stop = 0
    found = call()
    ours = [(name, 50) for name in measure.OURS[2:]]
    ours.insert(0, ("lvspec eager", 40))
    assert begun == ours + [(name, size) for size in (40, 50) for name in measure.PEERS]
    assert [found[40][name]["wall_ms"] for name in measure.OURS] == [1, 2, 1, 4]
    assert [found[50][name]["wall_ms"] for name in measure.OURS] == [5, 6, 2, 3]
    assert measure.COMPILED not in found[40]
    call("--compile")
    assert begun == [(measure.COMPILED, 40)]
    call("--iterations", "4")  # another run: nothing stays
    assert begun[0] == ("lvspec", 40) and len(begun) == 14
    assert "going on with 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (("--set", "gama=3"), "--set: expected FIELD=VALUE of DecodeConfig, got 'gama=3'"),
        (("--set", "gamma=0"), "gamma: expected"),
        (("--trace", "fly"), "trace: expected one of lvspec, strict, got 'fly'"),
        (("everything",), "expected some of embedded, pairs, trace, got everything"),
    ],
)
def test_options_are_checked(bench, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["e2e.py", *words])
    with pytest.raises(SystemExit) as stopped:
        bench("e2e").main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_fields_are_read_as_python(bench):
    found = bench("e2e").overrides(["gamma=3", "tree=specvlm", "draft_keep=0.5"])
    assert found == {"gamma": 3, "tree": "specvlm", "draft_keep": 0.5}


# Profile


def _event(name, ts, dur, correlation, cat="kernel"):
    return {"name": name, "ts": ts, "dur": dur, "cat": cat, "args": {"correlation": correlation}}


def test_gaps_of_a_trace_made_by_hand(bench):
    gaps = bench("measuring.gaps")
    replay = [
        _event("a", 100.0, 10.0, 7),
        _event("b", 112.0, 8.0, 7),  # 2 behind a
        _event("c", 115.0, 20.0, 7),  # overlaps b
        _event("d", 118.0, 2.0, 7),  # within c
        _event("copy", 135.0, 5.0, 7, "gpu_memcpy"),
        _event("a", 146.0, 4.0, 7),  # 6 behind the copy
    ]
    later = [{**event, "ts": event["ts"] + 150} for event in replay]
    later = [{**event, "args": {"correlation": 8}} for event in later]
    others = [
        _event("host", 0.0, 500.0, 7, "cuda_runtime"),
        _event("eager", 210.0, 10.0, 9),
        {"ph": "M", "name": "process_name"},
    ]
    events = gaps.work({"traceEvents": [*others, *later, *replay]})
    assert len(events) == 13 and events[0]["ts"] == 100
    found = gaps.gaps(replay)
    assert (found.span_us, found.idle_us, found.largest_us, found.kernels) == (50, 8, 6, 6)
    assert found.share == pytest.approx(0.16)
    assert [len(launch) for launch in gaps.replays(events, least=2)] == [6, 6]
    assert gaps.replays(events) == []
    whole = gaps.gaps(events)
    assert whole.span_us == 200 and whole.idle_us == 8 + 60 + 30 + 8
    table = gaps.by_kernel(events)
    assert table[0]["name"] == "c" and table[0]["count"] == 2
    assert sum(row["share"] for row in table) == pytest.approx(1)
    assert gaps.describe({"traceEvents": []})["share_within"] is None
    big = [{**e, "ts": e["ts"] + 50 * i} for i in range(5) for e in replay]
    said = gaps.describe({"traceEvents": [*big, *others]})
    assert said["replays"] == 1 and said["kernels_of_a_replay"] == 30
    assert said["share_within"] == pytest.approx(40 / 250)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_row_on_a_gpu(tmp_path):
    """Captured, with the tokens of the eager loop and of HF; its replays have few gaps to see."""
    path, profile = tmp_path / "e2e.json", tmp_path / "profile.json"
    common = ("--device", "cuda", "--pair", "tiny", "--context", CONTEXT)
    options = ("--batch", 1, 2, "--dtype", "float32", "--iterations", 5)
    done = run("bench/e2e.py", "pairs", *common, *options, "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(path.read_text())["pairs"]:
        assert row["methods"]["lvspec"]["loop"] == "graph", done.stdout
        assert row["methods"]["autoregression"]["loop"] == "graph"
        assert row["checks"]["captured"].startswith("the eager loop's tokens")
        assert row["checks"]["autoregression"].startswith("HF's greedy tokens")
    done = run("bench/profile_step.py", *common, "--json", profile)
    assert done.returncode == 0, done.stdout + done.stderr
    gaps = json.loads(profile.read_text())["gaps"]
    assert gaps["replays"] == 3 and 0 <= gaps["share_within"] < 1
