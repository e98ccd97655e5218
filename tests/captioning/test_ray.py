"""Captions by Ray's tasks and actors, for real: `make test-ray`, whose venv has ray."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest
from noise import write_noise

from lvspec import AcceptancePolicy, DecodeConfig
from lvspec.captioning.preparing import Checkpoints
from lvspec.captioning.shards import lines_of, part_of
from lvspec.cli import main
from lvspec.evaluation.samples import Sample

ray = pytest.importorskip("ray", reason="ray is in a venv of its own: make test-ray")
pytest.importorskip("ray.data")

from lvspec.ray import Actors, Setup, caption, caption_to_folder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of its own options

QUICK = ["--max-new-tokens", "32", "--gamma", "2", "--num-frames", "2", "--device", "cpu"]
CONFIG = DecodeConfig(max_new_tokens=4, gamma=2)
COUNT, BROKEN = 40, (3, 17, 31)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """A cluster of this machine, as if it had four CPUs; or that of RAY_ADDRESS."""
    here = os.environ.get("RAY_ADDRESS")
    size = {"num_cpus": 4, "object_store_memory": 400_000_000, "include_dashboard": False}
    # Workers have this folder on their path, where the root of our sources has a `kernels`.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ray"))
        ray.init(here or "local", **({} if here else size))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = write_noise(tmp_path_factory.mktemp("videos"), 3)
    for index in BROKEN:
        (folder / f"broken-{index}.mp4").write_bytes(b"no video")
    return folder


def video_of(index):
    return f"broken-{index}.mp4" if index in BROKEN else f"{index % 3}.mp4"


@pytest.fixture
def manifest(videos):
    path = videos / "manifest.jsonl"
    lines = [{"id": f"clip {i}", "video": video_of(i)} for i in range(COUNT)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def actor_pids():
    """Of processes that have models, by the names that Ray gives them."""
    found = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "(Captioner)" in line]


def kill_an_actor(journal, killed, is_over):
    """Once there are some rows, and not yet all."""
    while not is_over.is_set():
        rows = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
        pids = actor_pids() if rows >= 5 else []
        if len(pids) == 2:
            os.kill(pids[0], signal.SIGKILL)
            killed.append(rows)
            return
        time.sleep(0.01)


def test_every_id_once_though_an_actor_is_killed(manifest, random_pair_folders, tmp_path, capsys):
    target, draft = map(str, random_pair_folders)
    out = tmp_path / "out"
    path, killed = out / "captions-1-of-1.jsonl", []
    command = ["caption", "--manifest", manifest, "--prompt", "what?", "--out", str(out), *QUICK]
    command += ["--target", target, "--draft", draft, "--ray", "--actors", "2", "--batch-size", "2"]
    is_over = threading.Event()
    thread = threading.Thread(target=kill_an_actor, args=(part_of(path), killed, is_over))
    thread.start()
    try:
        code = main(command)
    finally:
        is_over.set()
        thread.join()
    printed, errors = capsys.readouterr()
    line = printed.splitlines()[-1]  # Ray says there that a process died
    assert line.startswith("37 captions | 3 failed | 0 were there | 0 left | "), errors
    assert code == 1  # some are broken
    assert killed and 5 <= killed[0] < COUNT
    found = [row for _, row in lines_of(path)]
    assert sorted(row["id"] for row in found) == sorted(f"clip {i}" for i in range(COUNT))
    failed = {row["id"]: row["error"] for row in found if row["error"] is not None}
    assert failed.keys() == {f"clip {i}" for i in BROKEN}
    assert all("not a video" in error for error in failed.values())
    texts = {}
    for row in found:  # whoever made it, and in whatever company
        if row["error"] is None:
            assert len(row["tokens"]) <= 32 and row["caption"] is not None
            assert texts.setdefault(row["video"], row["tokens"]) == row["tokens"]
    assert main(command) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("0 captions | 0 failed | 40 were there | 0 left")
    assert main([*command, "--gamma", "3"]) == 2
    assert "gamma: expected 2, with which" in capsys.readouterr().err


@dataclass(frozen=True)
class Deadly:
    """A clip that is called so kills the process that decodes it."""

    inner: Checkpoints

    @property
    def frames(self):
        return self.inner.frames

    def load(self):
        prepare = self.inner.load()

        def prepare_or_die(video, prompt):
            if os.path.basename(video) == "deadly.mp4":
                os.kill(os.getpid(), signal.SIGKILL)
            return prepare(video, prompt)

        return prepare_or_die


def test_a_clip_that_kills_its_process_is_a_row(videos, random_pair_folders, tmp_path):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker can import it
    target, draft = map(str, random_pair_folders)
    names = ["0.mp4", "deadly.mp4", "1.mp4"]
    samples = [Sample(name, str(videos / name), "what?") for name in names]
    setup = Setup(target, draft, "cpu", 2, AcceptancePolicy.strict(), CONFIG, {"num_frames": 2})
    done = caption_to_folder(
        *(samples, setup, Deadly(Checkpoints((target,), num_frames=2))),
        Actors(1, num_gpus=0),
        out=tmp_path,
    )
    assert done.left == 0 and done.pace["captions"] == 2 and done.pace["failed"] == 1
    errors = {row["id"]: row["error"] for _, row in lines_of(done.path)}
    assert errors.pop("deadly.mp4").startswith("worker: expected a process that lives")
    assert set(errors.values()) == {None}


def test_a_dataset_goes_on_by_rays_own_checkpoint(videos, random_pair_folders, tmp_path):
    from ray.data.checkpoint import CheckpointConfig

    target, draft = random_pair_folders
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=str(tmp_path / "checkpoint"),
        delete_checkpoint_on_success=False,
    )
    try:
        for count in (2, 4):
            lines = [{"id": f"{i}", "video": str(videos / video_of(i + 1))} for i in range(count)]
            manifest = tmp_path / "manifest.jsonl"
            manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
            dataset = caption(
                ray.data.read_json(str(manifest)),
                target=target,
                draft=draft,
                prompt="what?",
                num_frames=2,
                config=CONFIG,
                concurrency=1,
                num_gpus=0,
                batch_size=2,
            )
            dataset.write_json(str(tmp_path / "out"))
    finally:
        context.checkpoint_config = None
    found = [
        json.loads(line)
        for path in (tmp_path / "out").glob("*.json")
        for line in path.read_text().splitlines()
    ]
    assert sorted(row["id"] for row in found) == ["0", "1", "2", "3"]
    assert [row["id"] for row in found if row["error"]] == ["2"]
    text = dataset.stats()
    assert "Map(prepare)" in text and "Map(prepare)->" not in text
