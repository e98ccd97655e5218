"""A draft that may propose some tokens only: their logits are what they were, the rest is gone."""

import copy

import pytest
import torch
from policies import gated

from lvspec import AcceptancePolicy, AnchorTree, DecodeConfig, DynamicTree, generate, ops
from lvspec.engine.decoder import Decoder
from lvspec.models.head import draft_head
from lvspec.models.model import Model
from lvspec.phases.draft import DraftSource, ModelDrafter
from lvspec.phases.draft.factory import cost_ratio_of_bytes, draft_source, make_drafter
from lvspec.tree import chain_ancestors

STRICT = AcceptancePolicy.strict()
LOOSE = gated(0.12, regret_budget=3.0)
IDS = tuple(range(9, 220, 3))
WAYS = {
    "chain": ("model", {}),
    "static tree": ("model", {"tree": "specvlm"}),
    "dynamic tree": ("model", {"tree": DynamicTree(3, 3)}),
    "anchor tree": ("model", {"tree": AnchorTree(2, 3), "draft_anchor_threshold": 0.05}),
    "anchor stop": ("model", {"stop_at_unsure_anchors": 0.15, "draft_anchor_threshold": 0.05}),
    "n-grams for the draft": ("model", {"draft_ngram": 2}),
    "part of the video": ("model", {"draft_keep": 0.5}),
    "self": ("self", {"draft_keep": 0.5}),
}


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (9,), (2, ("image", 4, 8), 4)]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


@pytest.fixture(scope="module")
def common(pair, prompts):
    """Ids of which two thirds of the target's own captions are made, and none of the others."""
    config = DecodeConfig(max_new_tokens=40, eos_ids=())
    said = {
        token
        for prompt in prompts
        for token in generate(pair[0], None, prompt, config=config).tokens[0].tolist()
    }
    return tuple(sorted(token for token in said if token % 3))


def config(**options):
    given = {"gamma": 5, "max_new_tokens": 40, "eos_ids": (), "trace": True}
    return DecodeConfig(**{**given, **options})


def drafted(generation):
    return [token for step in generation.trace.steps() for token in step.drafted]


@pytest.mark.filterwarnings("error:lvspec:RuntimeWarning")
@pytest.mark.parametrize("capture", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("way", WAYS)
def test_strict_is_greedy(pair, prompts, common, way, capture, hf_greedy_once):
    draft, options = WAYS[way]
    draft = pair[1] if draft == "model" else draft
    chosen = config(draft_vocab=common, capture=capture, **options)
    found = generate(pair[0], draft, prompts, policy=STRICT, config=chosen)
    accepted = []
    for prompt, generation in zip(prompts, found, strict=True):
        assert generation.tokens[0].tolist() == hf_greedy_once(pair[0], prompt, 40)
        assert set(drafted(generation)) <= set(common)
        accepted += generation.stats.num_accepted
    assert sum(accepted) > 10 and min(accepted) == 0


@pytest.mark.parametrize(
    "way",
    ["chain", "dynamic tree", "self"]
    + [
        pytest.param(way, marks=pytest.mark.slow)
        for way in WAYS
        if way not in ("chain", "dynamic tree", "self")
    ],
)
def test_all_ids_are_as_no_choice(pair, prompts, way):
    """By a copy of the whole head, in a batch, under a loose policy."""
    draft, options = WAYS[way]
    draft = pair[1] if draft == "model" else draft
    whole, chosen = (
        generate(pair[0], draft, prompts, policy=LOOSE, config=config(draft_vocab=vocab, **options))
        for vocab in (None, range(256))
    )
    for ours, theirs in zip(chosen, whole, strict=True):
        assert ours.tokens.equal(theirs.tokens)
        assert drafted(ours) == drafted(theirs)
        assert ours.stats.num_accepted == theirs.stats.num_accepted


@pytest.mark.parametrize(
    "with_bias, capture", [pytest.param(False, False, marks=pytest.mark.slow), (True, True)]
)
def test_the_best_of_the_chosen_is_drafted(pair, prompts, with_bias, capture, hf_rows):
    target, draft = pair[0], copy.deepcopy(pair[1])
    if with_bias:
        draft.lm_head.bias = torch.nn.Parameter(torch.randn(256, dtype=torch.float64) * 3)
    chosen = config(draft_vocab=IDS, capture=capture)
    generation = generate(target, draft, prompts[0], policy=STRICT, config=chosen)
    tokens, ids = generation.tokens[0].tolist(), torch.tensor(IDS)
    for step in generation.trace.steps():
        rows, _ = hf_rows(draft, prompts[0], tokens[: step.position] + step.drafted)
        assert ids[rows[step.position : -1][:, ids].argmax(-1)].tolist() == step.drafted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_those_of_the_whole_head(dtype):
    head = torch.nn.Linear(96, 1001, dtype=dtype)
    ids = tuple(sorted(torch.randperm(1001)[:77].tolist()))
    chosen = draft_head(head, 1001, ids)
    hidden = torch.randn(2, 3, 96, dtype=dtype)
    with torch.inference_mode():
        ours, theirs = chosen(hidden), head(hidden)[..., list(ids)]
        exact = torch.nn.functional.linear(
            hidden.double(), head.weight.double(), head.bias.double()
        )
    rounding = 4 * torch.finfo(dtype).eps * exact.abs().max()  # tiles sum in their own order
    assert ours.shape == (2, 3, 77)
    assert (ours - theirs).abs().max() <= rounding
    assert chosen.ids(torch.tensor([[0, 76], [3, 3]], dtype=torch.int32)).tolist() == [
        [ids[0], ids[76]],
        [ids[3], ids[3]],
    ]
    spread = chosen.over_ids(ours, 1001)
    assert spread.shape == (2, 3, 1001) and spread[..., list(ids)].equal(ours)
    assert int(spread.isneginf().sum()) == 6 * (1001 - 77)


def test_without_a_choice_the_shared_columns(pair):
    head = draft_head(pair[1].lm_head, 200, None)
    hidden = torch.randn(1, 2, 256, dtype=torch.float64)
    with torch.no_grad():
        assert head(hidden).equal(pair[1].lm_head(hidden)[..., :200])
    columns = torch.tensor([3, 7])
    assert head.ids(columns) is columns
    assert head.over_ids(hidden, 9) is hidden
    assert [*head.parameters()] == [pair[1].lm_head.weight]


def test_one_copy_with_the_weights_of_now(random_pair, make_prompt):
    """It is made once, and a change of the weights is seen."""
    target, draft = random_pair[0], copy.deepcopy(random_pair[0])
    prompt = make_prompt(5, ("video", 2, 6, 4), 3)
    chosen = config(draft_vocab=IDS)

    def run():
        return drafted(generate(target, draft, prompt, policy=STRICT, config=chosen))

    before = run()
    copied = draft_head(draft.lm_head, 256, IDS)
    assert run() == before
    assert draft_head(draft.lm_head, 256, IDS) is copied
    assert draft_head(draft.lm_head, 256, IDS[1:]) is not copied
    with torch.no_grad():
        draft.lm_head.weight.data.neg_()  # the embedding too: they are one
    after = run()
    assert after != before
    fresh = copy.deepcopy(draft)
    assert drafted(generate(target, fresh, prompt, policy=STRICT, config=chosen)) == after
    assert draft_head(draft.double().lm_head, 256, IDS).head.weight.dtype == torch.float64


@pytest.mark.skipif(ops.active_backend("cpu") != "cpp", reason="needs the C++ operations")
@pytest.mark.parametrize("is_compact", [False, True])
def test_its_pass_is_one_operation(random_pair, is_compact):
    """The copy is no part of the model, and its product is in the pass with the same bits; also
    where the model's own head is read from a copy of 16 bits."""
    hf = copy.deepcopy(random_pair[0])
    if is_compact:
        hf.half().float()
    model = Model(hf, "draft")
    assert model.made.parts["compact"] == (15 if is_compact else 0)
    given = (
        torch.tensor([[8, 9, 10]]),
        torch.arange(3),
        chain_ancestors(3, batch_size=1, device=torch.device("cpu")),
    )
    found = []
    for head in (None, draft_head(hf.lm_head, 256, None), draft_head(hf.lm_head, 256, IDS)):
        assert model.made.cpu.takes(3, hf.lm_head if head is None else head)
        cache = model.new_cache(batch_size=1, capacity=9, num_slots=3)
        with torch.no_grad():
            found.append(model.step(*given, cache, head=head).logits)
    assert found[1].equal(found[0])
    torch.testing.assert_close(found[2], found[0][..., list(IDS)], rtol=0, atol=1e-5)
    assert is_compact or found[2].equal(found[0][..., list(IDS)])


def test_in_inference_mode(random_pair, make_prompt):
    draft, chosen = copy.deepcopy(random_pair[0]), config(draft_vocab=IDS)
    prompt = make_prompt(5)
    with torch.inference_mode():
        found = generate(random_pair[0], draft, prompt, policy=STRICT, config=chosen)
    again = generate(random_pair[0], draft, prompt, policy=STRICT, config=chosen)
    assert again.tokens.equal(found.tokens)


def test_samples(pair, prompts):
    """What is handed to the rule is what the tokens were drawn from, and -inf elsewhere."""
    chosen = config(draft_vocab=IDS, temperature=1.5, top_k=9, seed=3)
    decoder = Decoder(*pair, STRICT, chosen, batch_size=1)
    decoder.engine.admit(decoder.request(prompts[0]))
    engine, others = decoder.engine, torch.ones(256, dtype=torch.bool)
    others[list(IDS)] = False
    with torch.inference_mode(), engine.attention():
        for _ in range(4):
            done = engine.run_phases()
            logits = done.draft.logits
            assert logits.shape == (1, 5, 256) and logits[..., others].isneginf().all()
            assert (logits > -torch.inf).sum(-1).tolist() == [[9] * 5]
            assert (logits.gather(2, done.draft.tokens[:, 1:, None]) > -torch.inf).all()
            assert set(done.draft.tokens[0, 1:].tolist()) <= set(IDS)


def test_sequences_can_end(pair, prompts):
    """End-of-sequence ids of the config, else of the policy, else of the target."""
    target, draft = (Model(copy.deepcopy(model), "model") for model in pair)
    for given, of_policy, of_target, wanted in (
        ((7, 300), (8,), 5, {7}),
        (None, (8,), 5, {8}),
        (None, (), 5, {5}),
        (None, (), [5, 6], {5, 6}),
        ((), (8,), 5, set()),
    ):
        target.hf.generation_config.eos_token_id = of_target
        chosen = DecodeConfig(draft_vocab=(20, 10), eos_ids=given)
        drafter = make_drafter(target, draft, chosen, of_policy)
        assert drafter.head.vocabulary.tolist() == sorted({10, 20} | wanted)
        assert drafter.head.size == 2 + len(wanted)


def test_the_policys_end_is_drafted(pair, prompts):
    """A token that the draft could not propose otherwise."""
    whole = generate(*pair, prompts[0], policy=STRICT, config=config()).tokens[0].tolist()
    end = next(i for i in range(3, 30) if whole[i] not in whole[:i])
    policy = AcceptancePolicy.strict(eos_ids=(whole[end],))
    vocab = set(range(256)) - {whole[end]}
    found = generate(
        pair[0], "self", prompts[0], policy=policy, config=config(draft_vocab=vocab, eos_ids=None)
    )
    assert found.tokens[0].tolist() == whole[: end + 1]
    assert whole[end] in drafted(found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draft_vocab": ()}, ValueError, "^draft_vocab: expected at least one token id, or None"),
        ({"draft_vocab": (3, -1)}, ValueError, "^draft_vocab: .*-1"),
        ({"draft_vocab": (3, 1.5)}, TypeError, "^draft_vocab: .*1.5"),
        ({"draft_vocab": "words"}, TypeError, "^draft_vocab: expected token ids, got 'words'"),
        ({"draft_vocab": 3}, TypeError, "^draft_vocab: expected token ids, got 3"),
    ],
)
def test_config(options, error, message):
    with pytest.raises(error, match=message):
        DecodeConfig(**options)


def test_ids_are_sorted_once(prompts):
    assert DecodeConfig(draft_vocab=[9, 3, 9]).draft_vocab == (3, 9)
    assert DecodeConfig(draft_vocab=torch.tensor([9, 3])).draft_vocab == (3, 9)


def test_ids_that_a_model_lacks(random_pair, make_prompt):
    """The target has 256, the draft 224."""
    prompt = make_prompt(5)
    for vocab, message in (
        ((5, 230), "^draft_vocab: expected token ids below 224, the draft's vocabulary, got 230"),
        ((5, 999), "^draft_vocab: expected token ids below 256, the target's vocabulary, got 999"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*random_pair, prompt, config=config(draft_vocab=vocab))


@pytest.mark.parametrize(
    ("tree", "needed"),
    [("specvlm", 4), (DynamicTree(5, 2), 5), (AnchorTree(3, 4), 4), ([(0,), (0, 2)], 3)],
)
def test_too_few_ids_for_a_tree(random_pair, make_prompt, tree, needed):
    target = random_pair[0]
    few, enough = (tuple(range(10, 10 + count)) for count in (needed - 1, needed))
    with pytest.raises(ValueError, match=f"^draft_vocab: expected at least {needed} token ids for"):
        generate(target, target, make_prompt(5), config=config(draft_vocab=few, tree=tree))
    found = generate(target, target, make_prompt(5), config=config(draft_vocab=enough, tree=tree))
    assert set(drafted(found)) <= set(enough)


def test_a_head_that_cannot_be_copied(random_pair, make_prompt):
    draft = copy.deepcopy(random_pair[0])
    hook = draft.lm_head.register_forward_hook(lambda module, given, logits: 2 * logits)
    with pytest.raises(ValueError, match="^draft_vocab: expected .* without hooks"):
        generate(random_pair[0], draft, make_prompt(5), config=config(draft_vocab=IDS))
    hook.remove()
    generate(random_pair[0], draft, make_prompt(5), config=config(draft_vocab=IDS))


def test_what_a_pass_reads(random_pair):
    """The cost ratio of the bytes is that of the smaller head."""
    target, draft = (Model(model, "model") for model in random_pair)
    hidden, vocabulary = 256, draft.vocab_size
    head = draft_head(draft.hf.lm_head, vocabulary, IDS)
    saved = 4 * hidden * (vocabulary - len(IDS))
    assert draft.step_bytes_with(head) == draft.step_bytes - saved
    few = DecodeConfig(eos_ids=(), draft_vocab=IDS[:60])
    ratio = cost_ratio_of_bytes(target, draft_source(target, draft, few))
    saved = 4 * hidden * (vocabulary - 60)
    assert ratio == (draft.step_bytes - saved) / target.step_bytes


def test_a_drafter_by_itself(random_pair):
    """As others may make one: without a config."""
    model = Model(random_pair[1], "draft")
    drafter = ModelDrafter(DraftSource(model, 100, (4, 8, 15)), gamma=3)
    assert drafter.head.vocabulary.tolist() == [4, 8, 15]
    assert ModelDrafter(DraftSource(model, 100), gamma=3).head.size == 100
