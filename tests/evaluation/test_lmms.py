"""lvspec as a model of lmms-eval, for real: `make test-lmms`, whose venv has lmms-eval."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, generate_many
from lvspec.models.loading import load_pair
from lvspec.profile import Profile, identity
from lvspec.shapes.pair import DRAFT, TARGET, load_embedded_pair

gen_metrics = pytest.importorskip(
    "lmms_eval.models.model_utils.gen_metrics",
    reason="lmms-eval is in a venv of its own: make test-lmms",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "describe the video ."
PAIR = f"pretrained={TARGET},draft={DRAFT},dtype=float32,device=cpu,num_frames=8"
README = (ROOT / "lvspec" / "evaluation" / "README.md").read_text()


def block(kind):
    """The one block of this kind in the README's section."""
    (found,) = re.findall(rf"```{kind}\n(.*?)```", README.partition("## lmms-eval")[2], re.DOTALL)
    return found


def run(command, folder):
    """What a command of the shell prints, in a clone of the tree that has the venv's commands."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "ACCELERATE_USE_CPU": "1"}
    command = ["bash", "-ec", command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's commands can be run: the task's folder and the checkpoints."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "lvspec").symlink_to(ROOT / "lvspec")
    (folder / "make_clips.py").write_text(block("python"))
    run(f"'{sys.executable}' make_clips.py", folder)
    (folder / "my-task" / "shapes.yaml").write_text(block("yaml"))
    (folder / "my-task" / "utils.py").write_text(block("py"))
    return folder


@pytest.fixture(scope="module")
def videos(folder):
    return [folder / "my-task" / f"{index}.mp4" for index in range(4)]


@pytest.fixture(scope="module")
def captions(videos):
    """What lvspec.generate_many gives for them, strictly."""
    pair = load_embedded_pair()
    inputs = [pair.processor(video, PROMPT, num_frames=8) for video in videos]
    found = generate_many(
        *(pair.target, pair.draft, inputs),
        policy=AcceptancePolicy.strict(),
        config=DecodeConfig(max_new_tokens=160),
        tokenizer=pair.processor.tokenizer,
    )
    return [generation.text for generation in found]


@pytest.fixture(scope="module")
def commands(folder):
    """What the README's commands print, the strict one and the loose one together."""
    return run(block("sh"), folder)


def written(out):
    """(results, samples in the order of their documents) in a folder that lmms-eval wrote."""
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_shapes.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text()), sorted(found, key=lambda sample: sample["doc_id"])


def score(results):
    return results["results"]["shapes"]["words_score,none"]


def test_strict_gives_the_captions_of_generate(commands, folder, captions):
    results, samples = written(folder / "out-strict")
    assert score(results) == 100
    assert [sample["filtered_resps"] for sample in samples] == captions
    throughput = results["throughput"]
    tokens = sum(sample["token_counts"][0]["output_tokens"] for sample in samples)
    assert throughput["total_gen_tokens"] == tokens > 4 * 50
    assert 3 < throughput["avg_tau"] < 9 and throughput["avg_regret_per_token"] == 0
    assert 0.2 < throughput["avg_acceptance_rate"] < 1


def test_a_loose_policy_with_the_strict_one_as_baseline(commands, folder):
    strict, _ = written(folder / "out-strict")
    results, _ = written(folder / "out-lvspec")
    assert score(results) == 100 == results["results"]["shapes"]["paired_baseline_score"]
    throughput = results["throughput"]
    assert throughput["avg_tau"] > strict["throughput"]["avg_tau"] + 1
    assert throughput["avg_regret_per_token"] > 0
    rows = [line.split("|") for line in commands.splitlines() if line.startswith("|avg_tau")]
    printed = [float(row[2]) for row in rows]
    taus = [each["throughput"]["avg_tau"] for each in (strict, results)]
    assert printed == pytest.approx(taus, abs=1e-3)


def test_several_processes_share_the_documents(folder, captions):
    """By the module that is torchrun."""
    command = f"""python -m torch.distributed.run --standalone --nproc_per_node 2 \\
      --no-python lmms-eval --model lvspec --model_args {PAIR},policy=strict \\
      --tasks shapes --include_path my-task --output_path out-two --log_samples \\
      --limit 3 --batch_size 2"""
    run(command, folder)
    results, samples = written(folder / "out-two")
    assert score(results) == 100
    assert [sample["filtered_resps"] for sample in samples] == captions[:3]


def test_lmms_eval_prints_what_is_wrong_with_an_argument(folder):
    printed = run(
        f"lmms-eval --model lvspec --model_args {PAIR},max_frames=8 --tasks shapes "
        "--include_path my-task --output_path out-wrong",
        folder,
    )
    names = (
        "batch_size, device, draft, dtype, fps, gamma, num_frames, policy, pretrained, profile"
    )
    assert f"model_args: expected names among {names}, got max_frames" in printed
    assert not list((folder / "out-wrong").rglob("*"))


def model(arguments=PAIR, **additional):
    from lmms_eval.models import get_model

    return get_model("lvspec").create_from_arg_string(arguments, additional)


@pytest.fixture(scope="module")
def loaded():
    return model(f"{PAIR},policy=strict", batch_size="2")


def ask(model, documents, **settings):
    """Answers to messages, each with its own settings where `settings` has lists."""
    from lmms_eval.api.instance import Instance

    model.task_dict = {"asked": {"test": documents}}
    requests = []
    for index in range(len(documents)):
        own = {k: v[index] if isinstance(v, tuple) else v for k, v in settings.items()}
        arguments = ("", lambda document: document, own, index, "asked", "test")
        metadata = {"task": "asked", "doc_id": index, "repeats": 1}
        requests.append(Instance("generate_until", arguments, 0, metadata))
    return [result.text for result in model.generate_until(requests)]


def message(*contents, text=PROMPT, role="user"):
    parts = [
        content if isinstance(content, dict) else {"type": "video", "url": str(content)}
        for content in contents
    ]
    return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]


def test_every_request_has_its_own_settings_and_answers_keep_their_order(loaded, videos, captions):
    documents = [message(videos[index]) for index in range(4)]
    ends = (["."], ["\n\n"], ["."], [])
    found = ask(loaded, documents, until=ends, max_new_tokens=160)
    firsts = [caption.partition(".")[0] for caption in captions]
    assert found == [firsts[0], captions[1], firsts[2], captions[3]]
    (short,) = ask(loaded, documents[:1], max_new_tokens=5)
    assert captions[0].startswith(short) and len(short.split()) <= 5


def test_a_seed_of_the_harness_repeats_samples(videos):
    """Of one document asked twice they differ, as with lmms-eval's --repeats."""
    documents = [message(videos[0])] * 2
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        fresh = model(f"{PAIR},policy=strict")
        found.append(ask(fresh, documents, max_new_tokens=40, temperature=1.5, top_p=1.0))
    assert found[0] == found[1] and found[0][0] != found[0][1]


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_without_a_draft_model(videos, captions, draft):
    arguments = f"pretrained={TARGET},draft={draft},dtype=float32,device=cpu,num_frames=8"
    found = ask(model(arguments), [message(videos[0])], max_new_tokens=160)
    assert found == captions[:1]
    logged = gen_metrics.get_logged_metrics_history()[-1]
    assert ("acceptance_rate" in logged) == (draft == "ngram")
    assert logged["tau"] == 1 if draft == "none" else logged["tau"] >= 1


def test_fps_and_a_draft_of_other_frames(videos, captions, tmp_path):
    """A draft whose frames are prepared in another way gets inputs of its own."""
    shutil.copytree(DRAFT, tmp_path / "draft")
    path = tmp_path / "draft" / "video_preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.0, 0.9, 0.9]}))
    arguments = f"pretrained={TARGET},draft={tmp_path / 'draft'},dtype=float32,fps=2"
    fresh = model(f"{arguments},policy=strict,gamma=8", device="cpu")
    assert ask(fresh, [message(videos[0])], max_new_tokens=160) == captions[:1]
    logged = gen_metrics.get_logged_metrics_history()[-1]
    pair = load_pair(TARGET, tmp_path / "draft", dtype="float32", device="cpu")
    inputs, others = (
        processor(videos[0], PROMPT, fps=2) for processor in (pair.processor, pair.draft_processor)
    )
    own, same = generate_many(
        *(pair.target, pair.draft, [(inputs, others), inputs]),
        policy=AcceptancePolicy.strict(),
        config=DecodeConfig(gamma=8, max_new_tokens=160),
    )
    assert logged["tau"] == pytest.approx(own.stats.tau) != pytest.approx(same.stats.tau)


IMAGE = {"type": "image", "url": "a.png"}
PART = {"type": "video", "url": "a.mp4", "start_time": 1.0, "end_time": 2.0}


@pytest.mark.parametrize(
    ("document", "settings", "said"),
    [
        (message("a.mp4", "b.mp4"), {}, "expected one video, got 2 (a.mp4, b.mp4)"),
        (message(), {}, "expected one video, got 0"),
        (message(IMAGE), {}, "expected text and one video, got an image"),
        (message(PART), {}, "expected a whole video, got a.mp4 from 1.0 to 2.0 s"),
        (
            message({"type": "video", "url": {"path": "a.mp4", "video_start": 1}}),
            {},
            "expected the path of a video file, got dict",
        ),
        (message("a.mp4"), {"num_beams": 2}, "num_beams: expected 1, got 2"),
        (message("a.mp4"), {"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_any_caption(
    loaded, videos, document, settings, said
):
    first = message(videos[0])
    settings = {name: (None, value) for name, value in settings.items()}
    before = loaded._decoder
    with pytest.raises((TypeError, ValueError)) as caught:
        ask(loaded, [first, document], **settings)
    assert str(caught.value).startswith(f"asked, document 1: {said}")
    assert loaded._decoder is before


def test_a_video_that_cannot_be_read_is_named(loaded, videos):
    folder = videos[0].parent
    (folder / "broken.mp4").write_bytes(b"no video")
    for name in ("broken.mp4", "missing.mp4"):
        with pytest.raises(ValueError, match=f"^asked, document 0: .*{name}"):
            ask(loaded, [message(folder / name)])


def test_what_is_no_generation_is_refused(loaded):
    from lmms_eval.api.instance import Instance

    metadata = {"task": "choices", "doc_id": 0, "repeats": 1}
    for kind in ("loglikelihood", "generate_until_multi_round"):
        requests = [Instance(kind, (), 0, metadata)]
        said = f"expected tasks of output type generate_until, got {kind} in choices"
        with pytest.raises(NotImplementedError, match=said):
            getattr(loaded, kind)(requests)


def test_settings_of_no_meaning_are_named_once(loaded, videos, capsys):
    from loguru import logger

    said = []
    sink = logger.add(said.append, format="{message}")
    for _ in range(2):
        ask(loaded, [message(videos[0])], max_new_tokens=2, image_aspect_ratio="original")
    logger.remove(sink)
    left_out = [line for line in said if "left out" in line]
    assert left_out == ["lvspec: left out of generation_kwargs: image_aspect_ratio\n"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "pretrained: expected a checkpoint, got None"),
        (f"pretrained={TARGET}", "draft: expected a checkpoint, self, ngram, none, got None"),
        ("pretrained=no/model,draft=none", "pretrained: expected the folder of a checkpoint"),
        (f"pretrained={TARGET},draft=no/model", "draft: expected the folder of a checkpoint"),
        (f"{PAIR},policy=loose", "policy: expected one of strict, lvspec"),
        (f"{PAIR},gamma=64", "gamma: expected an integer from 1 to 63, got 64"),
        (f"{PAIR},profile=p.json,gamma=3", "gamma: expected none beside profile, which says it"),
        (f"{PAIR},profile=no/file", "profile: expected a file that lvspec calibrate wrote"),
        (f"{PAIR},fps=2", "num_frames, fps: expected one of them"),
        (PAIR.replace("float32", "int8"), "dtype: expected one of auto, float32"),
        (PAIR.replace("=cpu", "=tpu"), "device: expected cpu"),
    ],
)
def test_arguments_that_are_wrong(arguments, said):
    with pytest.raises((OSError, ValueError)) as caught:
        model(arguments)
    assert str(caught.value).startswith(said)


def profile_of(pair, path, gamma=3):
    """A profile such as `lvspec calibrate` writes for the pair."""
    policy = AcceptancePolicy.lvspec(max_regret=0.25)
    target, draft = identity(pair.target), identity(pair.draft)
    Profile(target, draft, policy.to_dict(), {"gamma": gamma}).write(path)
    return policy


def test_a_profile_says_policy_and_gamma(videos, tmp_path):
    pair = load_embedded_pair()
    policy = profile_of(pair, tmp_path / "profile.json")
    (found,) = ask(
        model(f"{PAIR},profile={tmp_path / 'profile.json'}"),
        [message(videos[0])],
        max_new_tokens=160,
    )
    (expected,) = generate_many(
        *(pair.target, pair.draft, [pair.processor(videos[0], PROMPT, num_frames=8)]),
        policy=policy,
        config=DecodeConfig(gamma=3, max_new_tokens=160),
        tokenizer=pair.processor.tokenizer,
    )
    assert found == expected.text
    logged = gen_metrics.get_logged_metrics_history()[-1]
    assert logged["tau"] == pytest.approx(expected.stats.tau) and logged["tau"] <= 4


def test_a_profile_of_another_pair_is_refused(tmp_path):
    pair = load_embedded_pair()
    profile_of(replace(pair, draft=pair.target), tmp_path / "profile.json")
    with pytest.raises(ValueError, match="^profile: expected the draft that it was made for"):
        model(f"{PAIR},profile={tmp_path / 'profile.json'}")


def test_clean_lets_go_of_the_models(videos):
    cleaned = model(f"pretrained={TARGET},draft=none,dtype=float32,device=cpu,num_frames=8")
    ask(cleaned, [message(videos[0])], max_new_tokens=2)
    cleaned.clean()
    assert not any(isinstance(value, torch.nn.Module) for value in vars(cleaned).values())
    assert cleaned._decoder is None
