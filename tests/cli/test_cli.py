"""The command line: what it prints, what it keeps, and how it refuses."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import wave
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvspec import ops
from lvspec.cli import COMMANDS, captioning, main, terminal
from lvspec.cli.info import computes_cuda
from lvspec.cli.options import POLICY_OPTIONS
from lvspec.config import DecodeConfig
from lvspec.engine.length import LOOSE
from lvspec.phases.draft.cost import best_gamma
from lvspec.policy import AcceptancePolicy
from lvspec.shapes import pair as embedded
from lvspec.shapes.tokenizer import SPECIAL_TOKENS, vocabulary
from lvspec.video import write_video

PROMPT = "describe the video."
COMMAND = shutil.which("lvspec", path=Path(sys.executable).parent) or "lvspec"


def changed(folder, copy, *, tensors=None, **files):
    """A copy of a checkpoint; `tensors` and each of `files` change their part in place.

    The names of `files` are those of the JSON files without their ending.
    """
    shutil.copytree(folder, copy)
    if tensors is not None:
        weights = load_file(copy / "model.safetensors")
        tensors(weights)
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
    for name, change in files.items():
        path = copy / f"{name}.json"
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")
    return copy


def family(model_type):
    return lambda value: value.update(model_type=model_type)


@pytest.fixture(scope="module")
def folders(random_pair_folders, tmp_path_factory):
    """(target, draft) of which the target never says a special token, and so never ends."""
    target, draft = random_pair_folders

    def silence(weights):
        (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
        weights[name][: len(SPECIAL_TOKENS)] = 0
        weights[name][len(vocabulary()) :] = 0

    return changed(target, tmp_path_factory.mktemp("talks") / "target", tensors=silence), draft


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a.mp4, b.mp4, text.mp4 (no video), sound.wav (no frames), and no none.mp4."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        generator = torch.Generator().manual_seed(seed)
        colours = torch.randint(0, 256, (8, 1, 1, 3), generator=generator, dtype=torch.uint8)
        write_video(folder / name, colours.expand(8, 84, 84, 3), fps=4)
    (folder / "text.mp4").write_text("no video\n" * 100)
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    return folder


@pytest.fixture
def lvspec(folders, files, capsys, monkeypatch, loaded_once):
    """`lvspec(options, …)` runs `lvspec generate` here: (exit code, stdout, stderr)."""
    monkeypatch.chdir(files)

    def run(*options, video=("a.mp4",), target=folders[0], draft=folders[1]):
        words = ["generate", "--video", *video, "--prompt", PROMPT, "--max-new-tokens", 24]
        words += ["--target", target] if target else []
        words += ["--draft", draft] if draft else []
        if not {"--gamma", "--cost-ratio"} & {*options}:
            words += ["--gamma", 12]  # what is measured is another matter
        code = main([str(word) for word in (*words, *options)])
        return code, *capsys.readouterr()

    return run


def assert_refused(result, *words):
    """Exit code 2, nothing on stdout, and one line on stderr with `words` in it."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("lvspec: error: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err


def test_generation_config_of_the_target(lvspec, folders, tmp_path):
    """Applied as HF does and said; left out on request, whose output is as without any."""
    settings = {"repetition_penalty": 1.3}
    penal = changed(
        folders[0], tmp_path / "penal", generation_config=lambda value: value.update(settings)
    )
    found = {}
    for name, target, options in (
        ("none", folders[0], ()),
        ("applied", penal, ()),
        ("ignored", penal, ("--ignore-generation-config",)),
    ):
        place = tmp_path / f"{name}.json"
        code, out, err = lvspec("--json", place, "--policy", "strict", *options, target=target)
        assert code == 0 and err == ""
        document = json.loads(place.read_text(encoding="utf-8"))
        assert document["config"]["generation_config"] == (name != "ignored")
        (found[name],) = document["results"]
        assert ("repetition_penalty 1.3" in out) == (name == "applied")
    assert found["applied"]["stats"]["generation_config"] == settings
    assert found["ignored"]["stats"]["generation_config"] == {}
    assert found["ignored"]["tokens"] == found["none"]["tokens"] != found["applied"]["tokens"]


def test_caption_json_and_streaming_agree(lvspec, tmp_path, folders):
    code, out, err = lvspec("--json", tmp_path / "out.json", "--strict-words", "red", "--gamma", 5)
    assert code == 0 and err == ""
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    (result,) = document["results"]
    heading, caption, statistics = out.splitlines()
    assert (heading, caption) == ("a.mp4", result["text"]) and len(caption.split()) > 10
    assert statistics.startswith("24 tokens | ") and "tau" in statistics and "nats" in statistics

    assert (result["video"], result["prompt"]) == ("a.mp4", PROMPT)
    assert result["error"] is None and result["interrupted"] is False
    assert len(result["tokens"]) == len(result["kinds"]) == len(result["relevance"]) == 24
    assert result["stats"]["gamma"] == document["config"]["gamma"] == 5
    assert document["target"] == str(folders[0]) and document["policy"]["name"] == "lvspec"
    assert document["policy"]["strict_ids"] == [vocabulary().index(" red")]
    assert {"lvspec", "torch", "transformers", "device", "threads", "python"} <= set(
        document["environment"]
    )

    code, streamed, _ = lvspec("--stream", "--strict-words", "red", "--gamma", 5)
    assert code == 0 and streamed.splitlines()[:2] == [heading, caption]


def test_strict_and_no_draft_are_the_same_caption(lvspec, tmp_path):
    loose = lvspec("--policy", "random_relaxation", "--random-share", 1)[1]
    strict = lvspec("--policy", "strict", "--json", tmp_path / "strict.json")[1]
    alone = lvspec("--no-draft", "--json", tmp_path / "alone.json", draft=None)[1]
    assert strict.splitlines()[1] == alone.splitlines()[1] != loose.splitlines()[1]
    assert "tau" not in alone
    strict, alone = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("strict", "alone"))
    assert strict["results"][0]["tokens"] == alone["results"][0]["tokens"]
    assert alone["draft"] is None and alone["policy"] is None
    assert set(alone["results"][0]["kinds"]) == {"bonus"}


def test_a_bad_video_does_not_lose_the_others(lvspec, tmp_path):
    video = ("none.mp4", "a.mp4", "text.mp4", "sound.wav", "b.mp4")
    code, out, err = lvspec("--stream", "--json", tmp_path / "out.json", video=video)
    assert code == 1
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["video"] for result in results] == list(video)
    errors = [result["error"] for result in results]
    assert [error is None for error in errors] == [False, True, False, False, True]
    assert "no such file" in errors[0] and "not a video" in errors[2]
    assert "no video stream" in errors[3] and "audio" in errors[3]
    assert err.splitlines() == [f"lvspec: error: {error}" for error in errors if error]
    for result in (results[1], results[4]):
        assert result["video"] in out and result["text"] in out
    table = out[out.rindex("tokens/s") :]
    assert "a.mp4" in table and "b.mp4" in table and "none.mp4" not in table


def test_ways_to_draft(lvspec, tmp_path):
    options = ["--tree", "specvlm", "--policy", "strict", "--trace"]
    code, _, err = lvspec("--json", tmp_path / "out.json", *options)
    assert code == 0 and err == ""
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert document["config"]["tree"] == "specvlm"
    (result,) = document["results"]
    stats = result["stats"]
    assert (stats["gamma"], stats["gamma_choice"]) == (25, None)
    assert stats["drafted"] == 25 * stats["iterations"]
    assert [len(step["regrets"]) for step in result["trace"]] == [25] * stats["iterations"]
    said = {str(token) for step in result["trace"] for token in step["drafted"]}
    assert said <= result["vocabulary"].keys()
    named = [result["vocabulary"][str(token)] for token in result["tokens"]]
    assert [name.split() for name in named] == [piece.split() for piece in result["pieces"]]
    # Two frames make a row of video tokens, of which every token's row has seen some.
    assert result["frames"]["timestamps"] == [0.0, 1.0]
    assert len(result["frames"]["mass"]) == len(result["tokens"])
    assert all(0 < share < 1 for row in result["frames"]["mass"] for share in row)
    assert (document["lvspec"], document["version"]) == ("captions", 1)


def test_frames_that_cannot_be_told_apart_are_said(lvspec, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("inputs: expected one video")

    monkeypatch.setattr(captioning, "frame_attention", refuse)
    code, out, err = lvspec("--trace", "--json", tmp_path / "out.json")
    assert code == 0 and "warning: a.mp4: no attention by frame: inputs: expected one" in err
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["frames"] == {"missing": "inputs: expected one video"} and result["trace"]
    assert "".join(result["pieces"]).strip() == result["text"]


def test_the_target_and_n_grams_draft(lvspec, tmp_path, folders):
    """Without a second checkpoint, beside a target of one's own or the embedded one."""
    path = tmp_path / "out.json"
    alone = lvspec("--no-draft", "--json", path, draft=None)[1].splitlines()[1]
    for word, options, policy in (
        (
            "self",
            ["--draft-keep", 0.5, "--draft-keep-by", "uniform", "--policy", "strict"],
            "strict",
        ),
        ("ngram", [], "strict"),
        ("self", [], "lvspec"),
        ("ngram", ["--policy", "relaxed"], "relaxed"),
    ):
        code, out, err = lvspec("--json", path, *options, draft=word)
        assert (code, err) == (0, "")
        assert (out.splitlines()[1] == alone) or policy != "strict"
        document = json.loads(path.read_text(encoding="utf-8"))
        assert (document["draft"], document["policy"]["name"]) == (word, policy)
        assert document["config"]["draft_keep"] == (0.5 if "--draft-keep" in options else 1.0)
        assert document["results"][0]["stats"]["iterations"] >= 1
    code, out, err = lvspec("--max-new-tokens", 8, target=None, draft="ngram")
    assert (code, err) == (0, "") and len(out.splitlines()) == 3


def test_specvlms_way(lvspec, tmp_path):
    options = ["--tree", "specvlm", "--draft-keep", 0.1, "--policy", "strict"]
    assert lvspec("--json", tmp_path / "out.json", *options)[0] == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["config"]
    wanted = dataclasses.asdict(DecodeConfig.specvlm(gamma=12, max_new_tokens=24))
    assert {name: found[name] for name in wanted} == json.loads(json.dumps(wanted))


def test_gamma_by_the_cost_model(lvspec, tmp_path):
    for options, gamma in (
        (["--cost-ratio", 0.1], best_gamma(LOOSE, 0.1)),
        (["--cost-ratio", 0.1, "--acceptance", 0.7, "--gamma", "auto"], best_gamma(0.7, 0.1)),
    ):
        code, out, _ = lvspec("--json", tmp_path / "out.json", *options)
        assert code == 0 and f"| gamma {gamma} |" in out
        document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert document["config"]["gamma"] == "auto"
        assert document["results"][0]["stats"]["gamma"] == gamma


def test_tokens_of_earlier_captions(lvspec, tmp_path):
    """The draft says nothing else, and the end of a sequence; the caption is the target's own."""
    path, other = tmp_path / "captions.json", tmp_path / "out.json"
    wanted = lvspec("--no-draft", "--json", path, draft=None)[1].splitlines()[1]
    document = json.loads(path.read_text(encoding="utf-8"))
    # The draft's vocabulary is smaller; what it lacks it could not say.
    tokens = [token for token in document["results"][0]["tokens"] if token < 224]
    document["results"][0]["tokens"] = tokens
    path.write_text(json.dumps(document))
    code, out, err = lvspec("--draft-vocab", path, "--policy", "strict", "--json", other)
    assert (code, err) == (0, "") and out.splitlines()[1] == wanted
    found = json.loads(other.read_text(encoding="utf-8"))["config"]["draft_vocab"]
    assert found == sorted(set(tokens))
    for content in ("[]", "{", '{"results": []}', '{"results": [{"tokens": ["a"]}]}'):
        path.write_text(content)
        assert_refused(lvspec("--draft-vocab", path), "--draft-vocab", path, "--json wrote")
    assert_refused(lvspec("--draft-vocab", tmp_path / "none.json"), "none.json")


def test_samples(lvspec):
    """A seed repeats them; one token alone is the greedy one."""

    def caption(*options):
        code, out, err = lvspec("--policy", "strict", *options)
        assert (code, err) == (0, "")
        return out.splitlines()[1]

    hot = ("--temperature", 2.5, "--sample-top-k", 50, "--sample-top-p", 0.99)
    assert caption(*hot, "--seed", 1) == caption(*hot, "--seed", 1) != caption(*hot, "--seed", 2)
    assert caption("--temperature", 2.5, "--sample-top-k", 1, "--seed", 3) == caption()


def test_quantised_draft(lvspec, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao (lvspec[quant])")
    wanted = lvspec("--policy", "strict")[1].splitlines()[1]
    options = ["--policy", "strict", "--draft-weights", "int8", "--json", tmp_path / "out.json"]
    code, out, _ = lvspec(*options)
    assert code == 0 and out.splitlines()[1] == wanted
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert document["draft_weights"] == "int8"


def test_quantised_draft_without_torchao(lvspec, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    result = lvspec("--draft-weights", "int8")
    assert_refused(result, "--draft-weights", "lvspec[quant]", "got int8")


@pytest.mark.parametrize("draft", ["self", "ngram"])
def test_nothing_to_quantise(lvspec, draft):
    result = lvspec("--draft-weights", "int8", draft=draft)
    assert_refused(result, "--draft-weights", f"got --draft {draft} and int8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gamma", 0], ["--gamma", "from 1 to 63", "got 0"]),
        (["--gamma", 64], ["--gamma", "from 1 to 63", "got 64"]),
        (["--tree", "medusa"], ["--tree", "specvlm", "got 'medusa'"]),
        (["--gamma", "many"], ["--gamma", "auto", "'many'"]),
        (["--acceptance", 1.5], ["--acceptance", "got 1.5"]),
        (["--temperature", -1], ["--temperature", "got -1"]),
        (["--sample-top-k", 5], ["--sample-top-k", "temperature=0", "got 5"]),
        (["--temperature", 1, "--sample-top-p", 2], ["--sample-top-p", "got 2"]),
        (["--temperature", 1, "--seed", -1], ["--seed", "got -1"]),
        (["--draft-keep", 2], ["--draft-keep", "got 2"]),
        (["--draft-weights", "int3"], ["--draft-weights", "int8", "int3"]),
        (["--max-new-tokens", 0], ["--max-new-tokens", "got 0"]),
        (["--trace"], ["--trace", "--json FILE"]),
        (["--num-frames", 0], ["--num-frames", "at least 2", "got 0"]),
        (["--num-frames", 1], ["--num-frames", "at least 2", "got 1"]),
        (["--num-frames", 999], ["a.mp4", "999", "8 frame"]),
        (["--fps", 0], ["--fps", "> 0", "got 0"]),
        (["--fps", 1, "--num-frames", 4], ["--num-frames", "--fps"]),
        (["--policy", "strict", "--top-k", 5], ["--top-k", "strict", "got 5"]),
        (["--typical-eps", 0.3], ["--typical-eps, --typical-delta:", "typical_delta=None"]),
        (["--min-entropy", 2, "--entropy-top", 3], ["--min-entropy", "entropy_top=3"]),
        (["--anchor-threshold", "nan"], ["--anchor-threshold", "nan"]),
        (["--policy", "loosest"], ["--policy", "loosest", "typical"]),
        (["--cache-capacity", 30], ["a.mp4: --cache-capacity", "at least", "got 30"]),
        (["--strict-words", "zebra"], ["--strict-words", "zebra"]),
        (["--device", "tpu"], ["--device", "cpu", "tpu"]),
        (["--device", "cuda:99"], ["--device", "cpu", "cuda:99"]),
        (["--threads", 0], ["--threads", "got 0"]),
        (["--json", "none/out.json"], ["--json", "none/out.json"]),
        (["--json", "."], ["--json", "folder"]),
        (["--json", "a.mp4"], ["--json", "a.mp4"]),
        (["--no-draft"], ["--draft", "--no-draft"]),
        (["--video", "text.mp4", "--num-frames", 1], ["--num-frames"]),
        (["--colour"], ["--colour: expected an option", "(lvspec generate --help explains)"]),
        (["--gama", 5], ["--gama", "did you mean --gamma?", "(lvspec generate --help"]),
        (["--tok-p=1"], ["--tok-p:", "did you mean --top-k?"]),
        (["-x"], ["-x", "(lvspec generate --help explains)"]),
        (["--top-k", 17], ["--top-k: expected an integer from 1 to 16, got 17"]),
        (["--strict-ids", -1], ["--strict-ids", "-1"]),
        (["--draft-vocab", "nope"], ["--draft-vocab", "got nope: No such file"]),
        (["--draft-vocab", "."], ["--draft-vocab", "got .: Is a directory"]),
        (["--prompt", "\udcff"], ["--prompt: expected text in UTF-8", "udcff"]),
        (["--strict-words", "red", "\udcff"], ["--strict-words: expected text in UTF-8"]),
    ],
)
def test_bad_options(lvspec, options, words):
    assert_refused(lvspec(*options), *words)


def test_bad_videos(lvspec, files):
    assert_refused(lvspec(video=["none.mp4"], target="none"), "none.mp4", "no such file")
    assert_refused(lvspec(video=["text.mp4"]), "text.mp4", "not a video")
    assert_refused(lvspec(video=["sound.wav"]), "sound.wav", "no video stream")
    assert_refused(lvspec(video=["."]), "folder")


def test_bad_checkpoints(lvspec, tmp_path, folders):
    target, draft = folders
    assert_refused(lvspec(draft=None), "--draft", target)
    assert_refused(lvspec(target=None), "--target", draft)
    assert_refused(lvspec(target="none/such"), "--target", "hub", "none/such")
    assert_refused(lvspec(draft=tmp_path), "--draft", "config.json", tmp_path)
    assert_refused(lvspec(draft="a.mp4"), "--draft", "a.mp4")

    def swap(value):
        words = value["model"]["vocab"]
        words[" red"], words[" blue"] = words[" blue"], words[" red"]

    first = vocabulary().index(" blue")
    other = changed(draft, tmp_path / "other", tokenizer=swap)
    assert_refused(lvspec(draft=other), f"token id {first} ", "' blue'", "' red'")

    for name in ("video_llava", "of_tomorrow"):
        copy = changed(draft, tmp_path / name, config=family(name))
        assert_refused(lvspec(draft=copy), "draft", "Qwen2.5-VL (qwen2_5_vl)", name)
        assert_refused(lvspec("--no-draft", target=copy, draft=None), "target", "qwen2_5_vl", name)


def test_a_name_in_the_hub_cache_is_a_checkpoint(lvspec, tmp_path, folders, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--talks"
    shutil.copytree(folders[0], cached / "snapshots" / "a1b2c3")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a1b2c3")
    named = lvspec("--no-draft", target="somebody/talks", draft=None)
    assert (
        named[0] == 0
        and named[1].splitlines()[1] == (lvspec("--no-draft", draft=None)[1].splitlines()[1])
    )


def test_weights_are_read_from_safetensors_only(lvspec, tmp_path, folders):
    pickled = changed(folders[1], tmp_path / "pickled")
    weights = pickled / "model.safetensors"
    torch.save(load_file(weights), pickled / "pytorch_model.bin")
    weights.unlink()
    assert_refused(lvspec(draft=pickled), "safetensors", pickled)
    assert_refused(lvspec("--no-draft", target=pickled, draft=None), "safetensors", pickled)
    cut = changed(folders[1], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((folders[1] / "model.safetensors").read_bytes()[:9999])
    assert_refused(lvspec(draft=cut), cut)


def test_remote_code_is_never_run(lvspec, tmp_path, folders):
    marker = tmp_path / "it-ran"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass It: pass\n"
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")
    remote = dict.fromkeys(names, "remote.It")

    def config(value):
        value["auto_map"] = remote

    def tokenizer(value):
        value["auto_map"] = {"AutoTokenizer": ["remote.It", None]}

    known = changed(folders[1], tmp_path / "a", config=config, tokenizer_config=tokenizer)
    unknown = changed(known, tmp_path / "b", config=family("it"))
    for folder in (known, unknown):
        (folder / "remote.py").write_text(code)
    assert lvspec(draft=known)[0] == 0
    assert lvspec("--no-draft", target=known, draft=None)[0] == 0
    assert_refused(lvspec(draft=unknown), "qwen2_5_vl", "'it'")
    assert not marker.exists()


def test_prompts_and_their_placeholder(lvspec, tmp_path, folders):
    pad = "<|video_pad|>"
    whole = f"<|vision_start|>{pad}<|vision_end|> describe"
    assert lvspec("--prompt", whole)[0] == 0
    assert_refused(lvspec("--prompt", pad + pad), "prompt", pad, "once", "got 2")
    silent = changed(folders[0], tmp_path / "silent")
    (template,) = silent.glob("*.jinja")
    template.write_text("{{ messages[0]['role'] }}")
    assert_refused(lvspec(target=silent), "prompt", pad, "got 0")


def test_nan_stops_and_keeps_what_was_generated(lvspec, tmp_path, folders):
    options = ["--no-draft", "--json", tmp_path / "whole.json"]
    lvspec(*options, draft=None)
    whole = json.loads((tmp_path / "whole.json").read_text())["results"][0]["tokens"]
    cut = next(place for place in range(5, 24) if whole[place] not in whole[:place])

    def poison(weights):
        (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
        weights["lm_head.weight"] = weights[name].clone()
        weights[name][whole[cut]] = torch.nan

    def untie(value):
        value["tie_word_embeddings"] = value["text_config"]["tie_word_embeddings"] = False

    broken = changed(folders[0], tmp_path / "broken", tensors=poison, config=untie)
    for draft, extra in ((None, ["--no-draft"]), (folders[1], ["--policy", "strict"])):
        code, out, err = lvspec(
            *extra, "--json", tmp_path / "nan.json", video=("a.mp4",), target=broken, draft=draft
        )
        (result,) = json.loads((tmp_path / "nan.json").read_text())["results"]
        assert code == 1
        assert "NaN" in err and "iteration" in err and "row" in err and err.count("\n") == 1
        assert result["tokens"] == whole[: len(result["tokens"])]
        assert len(result["tokens"]) == cut + 1 if draft is None else result["tokens"]
        assert result["error"] in err and result["text"] in out


def interrupting(monkeypatch, after):
    """Ctrl-C when `after` tokens have been streamed."""
    put, seen = terminal.PrintStreamer.put, []

    def put_and_interrupt(self, value):
        put(self, value)
        seen.extend(value.flatten().tolist() if seen or value.numel() == 1 else [])
        if len(seen) >= after:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.PrintStreamer, "put", put_and_interrupt)


def test_ctrl_c_without_json_says_where_the_text_is(lvspec, monkeypatch):
    interrupting(monkeypatch, after=7)
    code, out, err = lvspec("--stream", "--policy", "strict", video=("a.mp4", "b.mp4"))
    assert code == 130 and err.count("\n") == 1
    assert "interrupted in a.mp4 after 7 tokens" in err and "stands above" in err
    heading, caption, statistics = out.splitlines()
    assert heading == "a.mp4" and caption and statistics.startswith("7 tokens")


def test_ctrl_c_before_the_last_tokens_are_streamed(lvspec, monkeypatch):
    whole = lvspec("--policy", "strict")[1].splitlines()[1]
    interrupting(monkeypatch, after=4)
    monkeypatch.setattr(terminal.TokenText, "push", lambda *_: "")
    code, out, _ = lvspec("--stream", "--policy", "strict")
    assert code == 130 and out.splitlines()[1] == " ".join(whole.split()[:4])


def test_ctrl_c_while_loading(lvspec, monkeypatch, tmp_path):
    from lvspec.cli import captioning

    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(captioning, "load_models", load)
    code, out, err = lvspec("--json", tmp_path / "out.json")
    assert (code, out) == (130, "") and "before the first caption" in err
    assert json.loads((tmp_path / "out.json").read_text())["interrupted"] is True


def environment():
    keep = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return {**keep, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_generated(folders, files, tmp_path):
    place = tmp_path / "out.json"
    words = ["--target", folders[0], "--draft", folders[1], "--max-new-tokens", 20000]
    words += ["--video", files / "a.mp4", files / "b.mp4", "--prompt", PROMPT]
    process = subprocess.Popen(
        [COMMAND, "generate", *map(str, words), "--stream", "--json", str(place)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # what were read ahead here, `communicate` would not see
        # Whoever runs pytest in the background may have told it to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        heading = process.stdout.readline().decode()
        words = b""
        while words.count(b" ") < 8:
            words += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = (text.decode() for text in process.communicate(timeout=60))
    finally:
        process.kill()
    assert process.returncode == 130, err
    document = json.loads(place.read_text(encoding="utf-8"))
    (result,) = document["results"]
    count = len(result["tokens"])
    assert document["interrupted"] is result["interrupted"] is True and 8 <= count < 20000
    assert heading.endswith("a.mp4\n") and (words.decode() + out).startswith(result["text"] + "\n")
    assert err == (
        f"lvspec: interrupted in {files / 'a.mp4'} after {count} tokens; what was generated is in "
        f"{place}\n"
    )


@pytest.mark.slow
def test_the_command_prints_results_only(folders, files):
    words = ["--target", folders[0], "--draft", folders[1], "--video", "a.mp4", "--prompt", PROMPT]
    command = [COMMAND, "generate", *map(str, words), "--max-new-tokens", "6"]
    result = subprocess.run(command, cwd=files, env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    heading, caption, statistics = result.stdout.splitlines()
    assert heading == "a.mp4" and caption and statistics.startswith("6 tokens")
    assert "\x1b" not in result.stdout


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    page = capsys.readouterr().out
    assert all(f" {name}" in page for name in COMMANDS) and "demo" in COMMANDS
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert "or auto (default)" in page
    assert f"(default {DecodeConfig().max_new_tokens})" in page
    names = {*AcceptancePolicy().to_dict()} - {"strict_ids", "eos_ids", "name"}
    assert names == set(POLICY_OPTIONS)


def test_debug_keeps_the_traceback(lvspec, monkeypatch):
    monkeypatch.setenv("LVSPEC_DEBUG", "1")
    with pytest.raises(ValueError, match="gamma"):
        lvspec("--gamma", 64)


def test_our_own_errors_are_told_from_bad_input(lvspec, monkeypatch):
    from lvspec.cli import captioning

    def generate(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(captioning.Decoder, "generate", generate)
    code, out, err = lvspec()
    assert (code, out) == (1, "") and err.startswith("lvspec: error: ZeroDivisionError: ours")


def test_the_embedded_pair_is_the_default(lvspec):
    code, out, err = lvspec(target=None, draft=None)
    assert (code, err) == (0, "") and "tau" in out


def test_without_the_embedded_pair_others_are_asked_for(lvspec, monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "TARGET", tmp_path)
    assert_refused(lvspec(target=None, draft=None), "--target, --draft")


def test_info(capsys):
    """Versions, who computes, and a reason beside every backend."""
    assert main(["info"]) == 0
    page = capsys.readouterr().out
    for word in ("versions", "backends", "computes", "devices", "reference", "cpp", "triton"):
        assert word in page
    assert "embedded target" in page
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["backends"]) == {"reference", "cpp", "triton"}
    for text in facts["backends"].values():
        assert text[:3] in ("yes", "no ") and len(text) > 6
    assert facts["computes"]["cpu"].split()[0] == ops.active_backend("cpu")
    if not torch.cuda.is_available():
        assert facts["computes"]["cuda"] == "nothing: no CUDA device"
    assert facts["versions"]["torch"] == torch.__version__
    passes = facts["passes"]
    assert passes["embedded draft"]["layers"] == 2
    if ops.active_backend("cpu") == "cpp":
        expected = {"passes": "own: one operation", "layers": 12, "called": 0, "compact": 85}
        assert passes["embedded target"] == expected
        assert "own: one operation, 12 layers, 0 called, 85 compact" in page


@pytest.mark.parametrize(
    ("there_is_one", "problem", "computes"),
    [
        (False, "no CUDA device (TRITON_INTERPRET=1 ...)", "nothing: no CUDA device"),
        (True, "triton is not installed", "nothing: triton is not installed"),
        (True, "", "triton"),
    ],
)
def test_info_says_who_computes_on_cuda(there_is_one, problem, computes, monkeypatch):
    """What is not available computes nothing, whatever would be chosen if it were."""
    monkeypatch.setattr(ops, "backends", lambda: {"triton": ops.Backend(not problem, problem)})
    monkeypatch.setattr(ops, "active_backend", lambda kind: "triton")
    assert computes_cuda(there_is_one) == computes


def test_progress_of_the_library_is_said(lvspec, capsys):
    import logging

    assert lvspec()[0] == 0
    logging.getLogger("lvspec.engine.graph").info("capturing an iteration")
    assert capsys.readouterr().err == "lvspec: capturing an iteration\n"
