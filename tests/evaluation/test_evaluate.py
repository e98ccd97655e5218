"""evaluate: all methods on a random pair, going on after an interruption, and what is refused."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import transformers
from packaging.version import Version

import lvspec
from lvspec.config import DecodeConfig
from lvspec.environment import NotWritten
from lvspec.evaluation.methods import EvaluationInterrupted, Output
from lvspec.evaluation.samples import Problem, Sample, Samples
from lvspec.evaluation.ways import NAMES, Way, ways
from lvspec.policy import AcceptancePolicy
from lvspec.profile import Profile, identity


@pytest.fixture
def run(loaded_pair, samples, short, tmp_path):
    """`run(methods, ...)`: `evaluate` of the random pair into one folder."""

    def evaluate(*methods, **options):
        given = {"draft": loaded_pair.draft, "samples": samples, "config": short, **options}
        draft, found = given.pop("draft"), given.pop("samples")
        return lvspec.evaluate(
            loaded_pair.target,
            draft,
            found,
            processor=loaded_pair.processor,
            out=tmp_path / "out",
            methods=methods or None,
            show_progress=False,
            **given,
        )

    return evaluate


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").open()]


# HF's, with an assistant whose vocabulary is padded differently, fails on a video before 5.24.
ASSISTS = Version(transformers.__version__) >= Version("5.24")


def test_all_methods_side_by_side(run, samples, tmp_path):
    """Lossless ones say what the target says by itself, and every caption has its line."""
    names = [name for name in NAMES if name != "hf-assisted" or ASSISTS]
    done = run(*names, samples=samples[:2])
    assert [row["method"] for row in done.rows] == names and done.is_complete
    assert done.reference == "autoregression" and done.left_out == {}
    header, *records = lines(tmp_path)
    assert header["lvspec"] == "evaluation" and header["version"] == 1
    assert Counter(record["id"] for record in records) == dict.fromkeys(
        ["0.mp4", "1.mp4"], len(names)
    )
    own = {r["id"]: r["tokens"] for r in records if r["method"] == "autoregression"}
    for record in records:
        assert record["error"] is None and 1 < len(record["tokens"]) <= 8
        assert record["seconds"] > 0 and (record["prefill_s"] is None) == (
            record["method"] == "hf-assisted"
        )
        if record["method"] in ("hf-generate", "hf-assisted", "strict", "specvlm"):
            assert record["tokens"] == own[record["id"]]
            assert record["scores"]["own_same"] == record["scores"]["own_chrf"] == 1
    rows = {row["method"]: row for row in done.rows}
    for name in ("strict", "specvlm", "hf-generate"):
        low, high = (rows[name]["scores"]["own_same"][end] for end in ("low", "high"))
        assert low == pytest.approx(0.025 ** (1 / 2)) and high == 1
    assert rows["autoregression"]["speedup"] == rows["autoregression"]["decode_speedup"] == 1
    if ASSISTS:
        assert rows["hf-assisted"]["decode_speedup"] is None and rows["hf-assisted"]["speedup"] > 0
        assert rows["hf-assisted"]["cache"] == "static"
    assert rows["strict"]["tau"] == rows["strict"]["tau_without_bonus"] + 1 >= 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"] == done.rows and summary["samples"] == 2


def test_the_neutral_form_of_a_request(run, samples):
    """As serving engines count: whole steps, by position."""
    done = run("autoregression", "random", samples=samples[:1])
    record = done.records["0.mp4", "random"]
    found, stats = record["acceptance"], record["stats"]
    assert found["steps"] == stats["iterations"]
    assert found["accepted"] == sum(found["accepted_by_position"]) <= found["drafted"]
    assert found["mean_acceptance_length"] == 1 + found["accepted"] / found["steps"]
    assert found["accepted_by_position"][0] <= found["steps"]
    plain = done.records["0.mp4", "autoregression"]["acceptance"]
    tokens = len(done.records["0.mp4", "autoregression"]["tokens"])
    assert (plain["steps"], plain["accepted"]) == (tokens - 1, 0)
    assert plain["mean_acceptance_length"] == 1


def test_methods_take_turns_and_warm_up_once(run, samples, monkeypatch):
    """Another begins with each sample; a caption each beforehand does not count."""
    said = []

    def method(way, models):
        name = "own" if way.policy is None else way.policy.name

        def caption(prompt):
            said.append(name)
            return Output("text", 1.0, [1, 2], 1, 0.5)

        return caption

    monkeypatch.setattr(Way, "method", method)
    run("autoregression", "strict", "fly", samples=samples[:3])
    own, strict, fly = "own", "strict", "fly"
    warm_up, *rest = said[:3], said[3:6], said[6:9], said[9:]
    assert warm_up == [own, strict, fly]
    assert rest == [[own, strict, fly], [strict, fly, own], [fly, own, strict]]


@pytest.fixture
def interrupt_after(monkeypatch):
    """`interrupt_after(n)`: Ctrl-C in place of the caption behind the n-th; None: never again."""
    count, method = {"left": None, "made": 0}, Way.method

    def wrapped(way, models):
        caption = method(way, models)

        def counted(prompt):
            if count["left"] == 0:
                raise KeyboardInterrupt
            if count["left"] is not None:
                count["left"] -= 1
            count["made"] += 1
            return caption(prompt)

        return counted

    monkeypatch.setattr(Way, "method", wrapped)

    def after(number):
        count.update(left=number, made=0)
        return count

    return after


@pytest.mark.parametrize("number", [0, 2, 3, 6])
def test_interrupted_it_goes_on(run, samples, tmp_path, interrupt_after, number):
    """Two methods on three samples: whatever was captioned is not captioned again."""
    methods = ("autoregression", "strict")
    interrupt_after(number)
    with pytest.raises(EvaluationInterrupted) as stopped:
        run(*methods, samples=samples[:3])
    before = {(r["id"], r["method"]): r for r in lines(tmp_path)[1:]}
    assert len(before) == max(0, number - 2)  # less the warm-up of both
    assert {key for key, _ in stopped.value.results.records.items()} == before.keys()
    count = interrupt_after(None)
    done = run(*methods, samples=samples[:3])
    assert done.is_complete and len(done.records) == 6
    missing = {name for _, name in done.records.keys() - before.keys()}
    assert count["made"] == 6 - len(before) + len(missing)
    for key, record in before.items():
        assert done.records[key]["seconds"] == record["seconds"], "the very same caption"
    count = interrupt_after(None)
    again = run(*methods, samples=samples[:3])
    assert count["made"] == 0 and again.rows == done.rows


def test_new_samples_are_added_and_changed_ones_done_again(run, samples):
    run("autoregression", samples=samples[:1])
    other = Sample(samples[0].id, samples[0].video, "what happens ?")
    done = run("autoregression", samples=[other, samples[1]])
    assert done.is_complete and done.rows[0]["captions"] == 2
    assert done.records["0.mp4", "autoregression"]["prompt"] == "what happens ?"


def test_from_another_folder_it_goes_on(run, samples, videos, monkeypatch, interrupt_after):
    """Where a command is run from is no part of what it is about."""
    run("autoregression", samples=samples[:1])
    monkeypatch.chdir(videos)
    count = interrupt_after(None)
    assert run("autoregression", samples=[replace(samples[0], video="0.mp4")]).is_complete
    assert count["made"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 4}, "frames.num_frames: expected none, with which .* got 4"),
        ({"config": DecodeConfig(gamma=4, max_new_tokens=8)}, r"methods\.strict\.config\.gamma: "),
        ({"draft": "self"}, "draft.name: expected .* got .self"),
        ({"methods": ("strict", "fly")}, r"methods\.fly: expected none, with which"),
    ],
)
def test_a_folder_of_other_settings(run, samples, tmp_path, change, message):
    """Refused by the name of the first that differs, and left as it is."""
    run("strict", samples=samples[:1])
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    methods = change.pop("methods", ("strict",))
    with pytest.raises(ValueError, match=f"^{message}"):
        run(*methods, samples=samples[:1], **change)
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before


def test_a_video_that_is_none(run, samples, videos, tmp_path):
    """Its captions fail, the others do not, and it is tried again the next time."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    asked = [Sample("broken", str(broken), "what ?"), samples[0]]
    done = run("autoregression", "strict", samples=asked)
    assert not done.is_complete
    for row in done.rows:
        assert (row["captions"], row["failed"]) == (1, 1) and "broken.mp4" in row["error"]
    broken.write_bytes((videos / "1.mp4").read_bytes())
    done = run("autoregression", "strict", samples=asked)
    assert done.is_complete and [row["captions"] for row in done.rows] == [2, 2]


def test_a_method_that_fails(run, samples, monkeypatch):
    """It stands in the rows with its reason; the others are as they would be."""
    method = Way.method

    def failing(way, models):
        if not way.is_hf:
            return method(way, models)

        def caption(prompt):
            raise RuntimeError("no room\nfor the cache")

        return caption

    monkeypatch.setattr(Way, "method", failing)
    done = run("autoregression", "hf-generate", samples=samples[:2])
    own, other = done.rows
    assert (own["captions"], own["failed"], own["error"]) == (2, 0, None)
    assert other == {
        "method": "hf-generate",
        "captions": 0,
        "failed": 2,
        "error": "RuntimeError: no room for the cache",
    }


def test_what_the_models_cannot_do_is_left_out(run, samples):
    done = run(draft="ngram", samples=samples[:1])
    assert done.left_out == dict.fromkeys(["hf-assisted", "specvlm"], "needs a draft model")
    assert done.is_complete and len(done.rows) == len(NAMES) - 2
    with pytest.raises(ValueError, match="methods: expected one that these models can do"):
        run("strict", draft=None, samples=samples[:1])


def test_samples_with_problems(run, samples):
    problem = Problem("m.jsonl, line 2", "prompt: expected a text, got None")
    done = run("autoregression", samples=Samples((samples[0],), (problem,)))
    assert done.problems == (problem,) and not done.is_complete
    with pytest.raises(ValueError, match=r"samples: expected at least one, got none \(1 with"):
        run("autoregression", samples=Samples((), (problem,)))
    with pytest.raises(ValueError, match="samples: expected ids that differ, got '0.mp4' 2 times"):
        run("autoregression", samples=[samples[0], samples[0]])


def test_a_profile_stands_for_lvspec(run, loaded_pair, samples, short):
    policy = AcceptancePolicy.relaxed(top_k=3)
    pair = {"target": identity(loaded_pair.target), "draft": identity(loaded_pair.draft)}
    profile = Profile(**pair, policy=policy.to_dict(), config={"gamma": 5})
    done = run("lvspec", samples=samples[:1], profile=profile)
    assert done.records["0.mp4", "lvspec"]["stats"]["gamma"] == 5
    other = Profile(identity(loaded_pair.draft), pair["draft"], policy.to_dict())
    with pytest.raises(ValueError, match="^profile: expected the target that it was made for"):
        run("lvspec", samples=samples[:1], profile=other)
    with pytest.raises(ValueError, match="^policy, profile: expected one of them"):
        run("lvspec", samples=samples[:1], profile=profile, policy=policy)


def test_methods_of_ones_own(run, samples, short, loaded_pair, tmp_path):
    mine = {"mine": Way(AcceptancePolicy.typical(), short)}
    done = lvspec.evaluate(
        loaded_pair.target,
        loaded_pair.draft,
        samples[:1],
        processor=loaded_pair.processor,
        out=tmp_path / "mine",
        methods=mine,
    )
    assert [row["method"] for row in done.rows] == ["mine"] and done.reference is None
    assert done.rows[0]["speedup"] is None and done.rows[0]["scores"] == {}
    with pytest.raises(TypeError, match=r"methods\['mine'\]: expected Way, got 'strict'"):
        lvspec.evaluate(
            loaded_pair.target,
            loaded_pair.draft,
            samples,
            processor=loaded_pair.processor,
            out=tmp_path / "mine",
            methods={"mine": "strict"},
        )


def test_wrong_methods():
    with pytest.raises(ValueError, match="methods: expected some of .*, got 'eagle'"):
        ways(["strict", "eagle"])
    with pytest.raises(ValueError, match="methods: expected each once, got strict 2 times"):
        ways(["strict", "strict"])
    with pytest.raises(ValueError, match="methods: expected at least one, got none"):
        ways([])
    with pytest.raises(ValueError, match="config: expected temperature=0"):
        ways(config=DecodeConfig(temperature=0.5))


def test_an_out_that_is_a_file(run, samples, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match="^out: expected a folder, got .*out: a file"):
        run("strict", samples=samples)


def test_a_summary_that_cannot_be_written(run, samples, tmp_path):
    """The captions are there all the same."""
    (tmp_path / "out" / "summary.json").mkdir(parents=True)
    with pytest.raises(NotWritten, match="^out: expected a file that can be written, got "):
        run("strict", samples=samples[:1])
    assert len(lines(tmp_path)) == 2


def test_a_trace_is_kept_where_it_is_asked_for(run, samples):
    config = DecodeConfig(gamma=3, max_new_tokens=8, trace=True)
    done = run("strict", samples=samples[:1], config=config)
    record = done.records["0.mp4", "strict"]
    assert len(record["trace"]) == record["acceptance"]["steps"]
    assert {"drafted", "top_ids", "regrets"} <= record["trace"][0].keys()


def test_references_and_categories(run, samples, videos):
    """Scores against references, by category; a failing metric of the user's is said."""
    asked = [
        Sample("a", samples[0].video, "what ?", references=("a red ring",), category="free"),
        Sample(
            "b", samples[1].video, "A or B?", choices=("A. x", "B. y"), answer="A", category="mc"
        ),
    ]
    done = run("autoregression", samples=asked)
    (row,) = done.rows
    assert {"chrf", "bleu", "rouge_l", "choice", "own_choice", "own_chrf"} <= row["scores"].keys()
    assert row["scores"]["choice"]["count"] == row["scores"]["chrf"]["count"] == 1
    assert row["by_category"].keys() == {"free", "mc"}
    assert "choice" in row["by_category"]["mc"] and "choice" not in row["by_category"]["free"]
