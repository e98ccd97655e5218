"""A target over several processes: two of them, with gloo, on the CPU."""

import copy
import json
import shutil

import pytest
import ranks as support
import torch

from lvspec.models import pulse
from lvspec.models.loading import load_pair

WAIT = 900  # seconds for processes that end by themselves, of a machine that has others to run
OWN = "own"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def folders(random_pair_folders, noisy_draft, tmp_path_factory):
    """(target, noisy draft) on disk."""
    draft = tmp_path_factory.mktemp("noisy")
    shutil.copytree(random_pair_folders[0], draft, dirs_exist_ok=True)
    copy.deepcopy(noisy_draft).save_pretrained(draft)
    return random_pair_folders[0], draft


@pytest.fixture(scope="module")
def folder(make_prompt, tmp_path_factory):
    """With the prompts of a batch; processes write there."""
    found = tmp_path_factory.mktemp("ranks")
    videos = make_prompt(5, ("video", 2, 6, 4), 9), make_prompt(30, ("video", 3, 4, 4), 4, seed=1)
    torch.save(list(videos), found / "prompts.pt")
    return found


@pytest.fixture(scope="module")
def found(together, folders, folder):
    """What both processes gave, by way."""
    for number, process in enumerate(together("ways", folders, folder)):
        process.join(WAIT)
        assert process.exitcode == 0, (folder / f"ways{number}.txt").read_text()[-3000:]
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


@pytest.fixture(scope="module")
def alone(folders, folder):
    """What one process gives, by way."""
    pair = load_pair(*folders, dtype=torch.float64, device="cpu")
    prompts = torch.load(folder / "prompts.pt")
    found = {name: support.run(pair, prompts, name) for name in support.WAYS}
    return found | {"numbers": support.numbers_of(pair.target)}


def test_every_way_gives_what_one_process_gives(found, alone):
    for name in support.WAYS:
        for rank in found:
            for what in ("tokens", "kinds"):
                assert rank[name][what] == alone[name][what], (name, what)
            pairs = zip(rank[name]["relevance"], alone[name]["relevance"], strict=True)
            for ours, theirs in pairs:
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7), name


def test_the_first_process_has_the_word(found, alone):
    """Where another one drafts and accepts otherwise, its results are the first one's all the same.
    """
    for rank in found:
        for what in ("tokens", "kinds"):
            assert rank["parted"][what] == alone["chain"][what]


def test_a_process_has_its_part(found, alone):
    """Of weights and heads, and passes are lvspec's over it; HF's where that is asked for."""
    for number, rank in enumerate(found):
        chain = rank["chain"]
        assert chain["passes"] == {"target": f"own, part {number + 1} of 2", "draft": OWN}
        assert chain["parts"]["layers"] == 2
        layers, batch, heads = alone["chain"]["heads"]
        assert chain["heads"] == [layers, batch, heads // 2]
        hf = f"""HF's: fuse="none", part {number + 1} of 2"""
        assert rank["by HF's forward"]["passes"]["target"] == hf
        # The rest of a half is norms.
        assert alone["numbers"] / 2 < rank["numbers"] < alone["numbers"] * 0.51


def test_ways_that_are_worth_a_test(alone):
    """Drafts are accepted, and some of them loosely."""
    for name in ("chain", "tree", "self"):
        assert alone[name]["tau"] > 1.05, name
    assert alone["n-grams"]["drafted"] > 0
    for name in ("chain, loose", "tree, loose", "n-grams, loose"):
        kinds = [kind for row in alone[name]["kinds"] for kind in row]
        assert {1, 2} & set(kinds), name


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("die", "rank 1 gave no sign of life for 15 s"),
        ("stall", "rank 1 gave no sign of life for 15 s"),
        ("fail", "rank 1 failed: OSError: nobody listens"),
    ],
)
def test_a_process_in_trouble(together, folders, folder, job, message):
    """The other one ends with an error, and waits for nothing."""
    first, last = together(job, folders, folder)
    first.join(WAIT)
    assert first.exitcode not in (0, None)
    errors = (folder / f"{job}0.txt").read_text()
    if job == "stall":  # nothing but the pulse can tell
        assert f"lvspec: error: rank 0: {message}" in errors and last.is_alive()
    else:  # gloo may be first: the other end of its connection is closed
        assert message in errors or "by peer" in errors, errors
    assert pulse.BEAT + pulse.SILENCE + pulse.GRACE < 30
