"""What tasks and actors of a cluster do, without a cluster."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from clip_recipes import Recipe

from lvspec import DecodeConfig, generate, load_pair
from lvspec.captioning.alike import ALIKE
from lvspec.captioning.cluster import Captioner, Setup, prepare
from lvspec.cli import main
from lvspec.policy import AcceptancePolicy

CONFIG = DecodeConfig(max_new_tokens=6, gamma=2, eos_ids=())
POLICY = AcceptancePolicy.strict()


@pytest.fixture
def captioner(random_pair_folders):
    target, draft = map(str, random_pair_folders)
    return Captioner(Setup(target, draft, "cpu", 3, POLICY, CONFIG, {}))


class Inputs:
    """In place of a recipe: the inputs of prompts that are called like a video."""

    def __init__(self, of):
        self.of = of

    def load(self):
        return lambda video, prompt: [self.of[video]]


@pytest.fixture
def clips(make_prompt):
    """Prompts of several lengths, by the name of a video."""
    return {f"{n}.mp4": make_prompt(3, ("video", 2, 6, 4), 2 + n, seed=n) for n in range(5)}


def prepared(recipe, *names):
    rows = [prepare({"id": name, "video": name}, recipe, "what?") for name in names]
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


def test_calls_of_many_threads_are_decoded_together(captioner, clips, random_pair_folders):
    recipe = Inputs(clips)
    admitted, most = captioner._calls._decoder.engine, []
    admit = admitted.admit
    admitted.admit = lambda request: (admit(request), most.append(len(admitted.active)))
    ready = threading.Barrier(len(clips))

    def call(name):
        table = prepared(recipe, name)
        ready.wait()
        return captioner(table).to_pylist()

    with ThreadPoolExecutor(len(clips)) as pool:
        rows = [row for rows in pool.map(call, clips) for row in rows]
    pair = load_pair(*random_pair_folders, device="cpu")
    for name, row in zip(clips, rows, strict=True):
        wanted = generate(pair.target, pair.draft, clips[name], policy=POLICY, config=CONFIG)
        assert (row["id"], row["error"], row["tokens"]) == (name, None, wanted.tokens[0].tolist())
        assert row["caption"] == pair.processor.tokenizer.decode(row["tokens"]).strip()
        assert row["seconds"] > 0 and row["prompt"] == "what?" and len(row["settings"]) == 12
    assert len(most) == len(clips) and max(most) == 3


def test_what_fails_is_a_row(captioner, clips):
    recipe = Inputs({**clips, "odd.mp4": {"input_ids": torch.ones(2, 2, dtype=torch.int64)}})
    rows = captioner(prepared(recipe, "0.mp4", "odd.mp4", "none.mp4", "1.mp4")).to_pylist()
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    assert "expected input_ids of shape (1, T)" in rows[1]["error"]
    assert rows[2]["error"] == "KeyError: 'none.mp4'" and rows[2]["tokens"] is None


def test_a_prompt_is_the_rows_own_or_that_of_all():
    torn = prepare({"id": 1, "video": "torn-1.mp4", "prompt": "why?"}, Recipe(), "what?")
    assert (torn["id"], torn["prompt"], torn["warnings"]) == ("1", "why?", ["3 frames are lost"])
    none = prepare({"id": 1, "video": "a.mp4", "prompt": None}, Recipe(), None)
    assert none["error"].startswith("prompt: expected a text") and none["inputs"] == b""
    with pytest.raises(ValueError, match="^dataset: expected columns id and video, got id, path"):
        prepare({"id": 1, "path": "a.mp4"}, Recipe(), "what?")


def test_an_actor_whose_device_breaks_ends(captioner, clips, monkeypatch, capfd):
    """Or it would be given everybody's clips: to fail is quick."""
    ended = []
    monkeypatch.setattr("lvspec.captioning.cluster.os._exit", ended.append)
    monkeypatch.setattr(
        captioner._calls, "generate", lambda *inputs: (_ for _ in ()).throw(RuntimeError("CUDA"))
    )
    for count in range(1, ALIKE + 1):
        (row,) = captioner(prepared(Inputs(clips), f"{count % 5}.mp4")).to_pylist()
        assert row["error"] == "RuntimeError: CUDA" and bool(ended) == (count == ALIKE)
    assert (
        ended == [1] and "10 clips in a row fail with: RuntimeError: CUDA" in capfd.readouterr().err
    )


def test_without_ray_the_extra_is_named(monkeypatch, capsys, tmp_path, random_pair_folders):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lvspec.ray", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lvspec\[ray\]'"):
        import lvspec.ray  # noqa: F401
    (tmp_path / "a.mp4").write_bytes(b"no video")
    given = [
        "caption",
        "--videos",
        str(tmp_path),
        "--prompt",
        "what?",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*given, "--ray"]) == 2
    assert "--ray: lvspec.ray: expected ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--actors", "2"], "--actors: expected --ray beside it, got --actors 2"),
        (["--ray", "--device", "cuda:1"], "--device: expected cpu or cuda beside --ray"),
        (["--ray", "--actors", "0"], "--actors: expected at least 1, got 0"),
    ],
)
def test_bad_options(wrong, message, capsys):
    assert main(["caption", "--videos", ".", "--prompt", "what?", "--out", "out", *wrong]) == 2
    assert message in capsys.readouterr().err
