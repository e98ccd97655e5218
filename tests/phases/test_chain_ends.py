"""A chain ends with the draft's own end of sequence: the slots behind it are padding."""

import copy

import pytest
import torch
from ways import WAYS

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.models.cpu_pass import CpuPass
from lvspec.models.model import Model
from lvspec.phases.draft.model_cache import CachedDrafter
from lvspec.phases.slots import DraftShape, tokens_up_to_end

STRICT = AcceptancePolicy.strict()
CHAINS = ["chain", "anchor stop", "n-grams for the draft", "sampling", "few tokens", "self"]


def test_literals():
    tokens = torch.tensor([[5, 2, 9, 2], [5, 6, 7, 8], [9, 5, 2, 5], [5, 6, 7, 2]])
    assert tokens_up_to_end(tokens, torch.tensor([2])).tolist() == [2, 4, 3, 4]
    assert tokens_up_to_end(tokens, torch.tensor([2, 9])).tolist() == [2, 4, 1, 4]
    assert tokens_up_to_end(tokens, torch.tensor([], dtype=torch.int64)).tolist() == [4] * 4
    assert tokens_up_to_end(tokens[:, :0], torch.tensor([2])).tolist() == [0] * 4


def test_a_root_is_no_end_and_no_chain_grows():
    shape = DraftShape.chain(3, batch_size=3, device=torch.device("cpu"))
    shape.num_slots[2] = 2  # it ends before
    tokens = torch.tensor([[2, 5, 2, 2], [2, 5, 6, 7], [5, 6, 6, 2]])
    found = shape.ending(tokens, torch.tensor([2])).num_slots
    assert found.tolist() == [3, 4, 2] and found.dtype == torch.int32


@pytest.fixture(scope="module")
def setting(random_pair, make_prompt, noisy_draft):
    prompts = [make_prompt(3, ("video", 4, 6, 6), 5, seed=seed) for seed in range(3)]
    return random_pair[0], copy.deepcopy(noisy_draft), prompts


def _run(setting, way, policy=STRICT, **config):
    target, model, prompts = setting
    draft, options = WAYS[way]
    if "stop_at_unsure_anchors" in options:
        options = {"stop_at_unsure_anchors": 1e-9}  # which never stops
    config = {"gamma": 10, "max_new_tokens": 24, "trace": True, **options, **config}
    draft = model if draft == "model" else draft
    return generate(target, draft, prompts, policy=policy, config=DecodeConfig(**config))


@pytest.mark.parametrize("way", CHAINS)
def test_nothing_behind_an_end_is_verified_or_counted(setting, way):
    """With every id an end that a draft without ends says somewhere in the middle of a chain."""
    said = [
        token
        for g in _run(setting, way, eos_ids=())
        for s in g.trace.steps()
        for token in s.drafted[1:-1]
    ]
    ends = tuple(sorted(set(said))[::3])
    found = _run(setting, way, eos_ids=ends)
    seen = 0
    for generation in found:
        drafted = [step.drafted for step in generation.trace.steps()]
        assert generation.stats.num_drafted == sum(map(len, drafted))
        assert generation.stats.counts["rejected"] >= 0
        for chain in drafted:
            assert not set(chain[:-1]) & set(ends)
            seen += bool(chain) and chain[-1] in ends and len(chain) < 10
    assert seen > 0, "a chain ends early"


@pytest.mark.parametrize("way", ["chain", "n-grams for the draft", "anchor stop"])
def test_strict_says_the_same(setting, way):
    whole = _run(setting, "autoregression", eos_ids=())
    end = whole[0].tokens[0, 20].item()
    for ours, theirs in zip(_run(setting, way, eos_ids=(end,)), whole, strict=True):
        tokens = theirs.tokens[0].tolist()
        count = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert ours.tokens[0].tolist() == tokens[:count]


@pytest.mark.parametrize("way", ["chain", "sampling", "n-grams for the draft"])
def test_passes_behind_all_ends_are_left_out(setting, way, monkeypatch):
    """On a CPU; where there is none to look all are run, and the draft is the same."""
    passes, step, chain = [], Model.step, CpuPass.chain

    def counted(self, *args, **kwargs):
        passes.append(self.role)
        return step(self, *args, **kwargs)

    def counted_at_once(self, tokens, depths, ancestors, moved, cache, count, head):
        passes.extend(["draft"] * count)
        return chain(self, tokens, depths, ancestors, moved, cache, count, head)

    monkeypatch.setattr(Model, "step", counted)
    monkeypatch.setattr(CpuPass, "chain", counted_at_once)
    plain = _run(setting, way, eos_ids=())
    firsts = {g.tokens[0, 0].item() for g in plain}
    ends = tuple({g.trace.steps()[0].drafted[2] for g in plain} - firsts)
    passes.clear()
    few = _run(setting, way, eos_ids=ends)
    counts = [passes.count("draft")]
    make = CachedDrafter._make_shape

    def blind(self, *args):
        make(self, *args)
        self._may_look = False

    monkeypatch.setattr(CachedDrafter, "_make_shape", blind)
    passes.clear()
    all_passes = _run(setting, way, eos_ids=ends)
    counts.append(passes.count("draft"))
    assert 0 < counts[0] < counts[1]
    for ours, theirs in zip(few, all_passes, strict=True):
        assert ours.tokens.equal(theirs.tokens)
        mine, others = ours.trace.steps(), theirs.trace.steps()
        assert [s.drafted for s in mine] == [s.drafted for s in others]
        assert ours.stats.num_accepted == theirs.stats.num_accepted
