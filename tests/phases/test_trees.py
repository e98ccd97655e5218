"""Draft trees: the target's own tokens, and nodes that are the draft's own choices.

In float64, where rows of different passes do not differ by enough to change a token.
"""

import copy
import math

import pytest
import torch
from policies import gated

from lvspec import AcceptancePolicy, AnchorTree, DecodeConfig, DynamicTree, SkipTree, generate
from lvspec.engine.api import generate_many
from lvspec.reference.kinds import KIND_NAMES
from lvspec.tree_shapes import NAMED_TREES, StaticTree

PATHS = ((1,), (0,), (3,), (1, 0), (1, 2), (0, 0), (3, 1), (1, 0, 1), (1, 2, 0), (1, 0, 1, 0))
TREES = {
    "specvlm": "specvlm",
    "paths": PATHS,
    "dynamic": DynamicTree(4, 3),
    "few children": DynamicTree(6, 4, top_k=2),
    "anchors": AnchorTree(2, 5),
    "skips": SkipTree(3, 9),
}
THRESHOLD = 0.12  # of the draft's peak: some rows are anchors, some are not
POLICIES = {
    "strict": AcceptancePolicy.strict(),
    "loose": gated(0.12, regret_budget=3.0),
    "no gate": gated(math.inf, top_k=3),
}


@pytest.fixture(scope="module")
def models(random_pair, noisy_draft):
    """The target and two drafts: one of another vocabulary, one that agrees now and then."""
    found = {"target": random_pair[0], "random": random_pair[1], "noisy": noisy_draft}
    return {name: copy.deepcopy(model).double() for name, model in found.items()}


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (9,), (1, ("video", 2, 4, 14), 7), (2, ("image", 4, 8), 4)]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


def _config(tree, **config):
    config = {"gamma": 4, "max_new_tokens": 24, "eos_ids": (), "trace": True, **config}
    return DecodeConfig(tree=tree, draft_anchor_threshold=THRESHOLD, **config)


def _run(models, prompts, tree, *, draft="noisy", policy="strict", **config):
    return generate(
        models["target"],
        models[draft],
        prompts,
        policy=POLICIES[policy],
        config=_config(TREES.get(tree, tree), **config),
    )


@pytest.mark.parametrize(
    "draft", ["noisy", "random", pytest.param("target", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tree", TREES)
def test_strict_is_greedy_for_a_batch(models, prompts, tree, draft, hf_greedy_once):
    for prompt, generation in zip(prompts, _run(models, prompts, tree, draft=draft), strict=True):
        assert generation.tokens[0].tolist() == hf_greedy_once(models["target"], prompt, 24)


@pytest.mark.parametrize("policy", [pytest.param("strict", marks=pytest.mark.slow), "loose"])
@pytest.mark.parametrize("tree", TREES)
def test_each_of_a_batch_as_alone(models, prompts, tree, policy):
    together = _run(models, prompts, tree, policy=policy)
    policy, config = POLICIES[policy], _config(TREES[tree])
    in_turn = generate_many(
        models["target"], models["noisy"], prompts, batch_size=2, policy=policy, config=config
    )
    for prompt, ours, theirs in zip(prompts, together, in_turn, strict=True):
        alone = generate(models["target"], models["noisy"], prompt, policy=policy, config=config)
        for generation in (ours, theirs):
            assert generation.tokens.equal(alone.tokens)
            assert generation.kinds.equal(alone.kinds)
            paths = [(step.drafted, step.path) for step in generation.trace.steps()]
            assert paths == [(step.drafted, step.path) for step in alone.trace.steps()]


class _Continuations:
    """What the draft says behind the first tokens of the output, by HF alone."""

    def __init__(self, hf_rows, draft, inputs, tokens):
        self.last_id = draft.config.text_config.vocab_size - 1
        self.ask = lambda path: hf_rows(
            draft, inputs, [min(t, self.last_id) for t in [*tokens, *path]]
        )
        self.known = {}

    def __getitem__(self, path):
        """(log-probabilities, peak) of the row behind `path`."""
        if path not in self.known:
            logits, peaks = self.ask(path)
            self.known[path] = (logits[-1].log_softmax(-1), float(peaks[-1]))
        return self.known[path]


def _named(step):
    """The tokens on the way to every slot."""
    ways = [()]
    for token, parent in zip(step.drafted, step.parents, strict=True):
        ways.append((*ways[parent], token))
    return ways


def _expected_static(rows, branches):
    tree = StaticTree.of(branches)
    ways = [()]
    for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
        order = rows[ways[parent]][0].argsort(descending=True)
        ways.append((*ways[parent], int(order[rank])))
    return ways


def _expected_dynamic(rows, tree):
    ways, level = [()], [(0.0, ())]
    for width in tree.widths:
        children = []
        for log_prob, way in level:
            best = rows[way][0].topk(tree.children)
            children += [
                (log_prob + float(value), (*way, int(token)))
                for value, token in zip(*best, strict=True)
            ]
        level = sorted(children, key=lambda child: -child[0])[:width]
        ways += [way for _, way in level]
    return ways


def _expected_anchors(rows, tree, gamma):
    chain, log_prob, others = [()], 0.0, []
    for _ in range(gamma):
        found, peak = rows[chain[-1]]
        values, tokens = found.topk(tree.siblings + 1)
        if peak >= THRESHOLD:
            others += [
                (log_prob + float(value), (*chain[-1], int(token)))
                for value, token in zip(values[1:], tokens[1:], strict=True)
            ]
        log_prob += float(values[0])
        chain.append((*chain[-1], int(tokens[0])))
    best = sorted(others, key=lambda child: -child[0])[: tree.nodes]
    return chain + [way for _, way in best]


def _expected(rows, tree, gamma=4):
    if isinstance(tree, DynamicTree):
        return _expected_dynamic(rows, tree)
    if isinstance(tree, AnchorTree):
        return _expected_anchors(rows, tree, gamma)
    return _expected_static(rows, tree)


@pytest.mark.parametrize(
    "policy, tree",
    [
        ("strict", DynamicTree(4, 3)),
        ("strict", AnchorTree(2, 8)),
        ("no gate", PATHS),
        ("no gate", DynamicTree(5, 2, top_k=2)),
        pytest.param("strict", PATHS, marks=pytest.mark.slow),
        pytest.param("strict", DynamicTree(5, 2, top_k=2), marks=pytest.mark.slow),
        pytest.param("no gate", DynamicTree(4, 3), marks=pytest.mark.slow),
        pytest.param("no gate", AnchorTree(2, 8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nodes_are_the_drafts_own_choices(models, make_prompt, tree, policy, hf_rows):
    """After any path was accepted: rows that stand where they belong, that move, and leaves.

    A wrong row in the draft's cache would give other nodes from there on.
    """
    draft, has_moved, has_leaf, sizes = models["noisy"], set(), set(), set()
    for seed in range(2):
        prompt = make_prompt(3, ("video", 4, 6, 6), 5, seed=seed)
        prompt = {n: x.double() if x.is_floating_point() else x for n, x in prompt.items()}
        generation = _run(models, prompt, tree, policy=policy, max_new_tokens=20)
        tokens = generation.tokens[0].tolist()
        for step in generation.trace.steps():
            rows = _Continuations(hf_rows, draft, prompt, tokens[: step.position])
            assert _named(step) == _expected(rows, tree)
            inner = step.path[:-1]  # the row of the last is written anew
            has_moved.add(inner != list(range(1, len(inner) + 1)))
            has_leaf.add(bool(step.path) and step.path[-1] not in step.parents)
            sizes.add(len(step.drafted))
    assert True in has_leaf
    assert (True in has_moved) != isinstance(tree, AnchorTree)
    assert (len(sizes) > 1) == isinstance(tree, AnchorTree)


def test_tokens_of_another_vocabulary(models, prompts, hf_rows):
    """What only the target knows reaches the draft as its last id; only shared ids are proposed."""
    prompt, draft = prompts[0], models["random"]
    for tree in (PATHS, DynamicTree(3, 2), AnchorTree(1, 3)):
        generation = _run(models, prompt, tree, draft="random")
        tokens = generation.tokens[0].tolist()
        assert max(tokens) >= 224
        for step in generation.trace.steps()[:3]:
            rows = _Continuations(hf_rows, draft, prompt, tokens[: step.position])
            assert _named(step) == _expected(rows, tree)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    "policy", ["loose", "no gate", pytest.param("strict", marks=pytest.mark.slow)]
)
def test_replay_of_the_trace(models, prompts, tree, policy, hf_rows):
    """Choices, relevance and regret of the emitted tokens, from one HF forward over them."""
    generation = _run(models, prompts[0], tree, policy=policy, max_new_tokens=40)
    steps = generation.trace.steps()
    tokens, kinds, predictors = generation.tokens[0, :1].tolist(), ["bonus"], []
    for step in steps:
        assert step.position == len(tokens)
        tokens += [step.drafted[slot - 1] for slot in step.path]
        tokens.append(step.wanted[step.path[-1] if step.path else 0])
        kinds += [*step.kinds, "bonus"]
        predictors += [(step, slot) for slot in (0, *step.path)]
    assert generation.tokens[0].tolist() == tokens[:40]
    assert [KIND_NAMES[code] for code in generation.kinds[0]] == kinds[:40]

    logits, peaks = hf_rows(models["target"], prompts[0], tokens)
    regret = 0.0
    for index, (step, slot) in enumerate(predictors, start=1):
        assert step.wanted[slot] == int(logits[index].argmax())
        assert step.relevance[slot] == pytest.approx(float(peaks[index]), abs=1e-6)
        if index < 40:
            regret += float(logits[index].max() - logits[index, tokens[index]])
            assert (kinds[index] in ("exact", "bonus")) == (tokens[index] == step.wanted[slot])
    # HF's norms and softmax round to float32, which shows in each of up to forty regrets.
    assert generation.stats.regret == pytest.approx(regret, abs=40 * 1e-7)
    assert (regret > 0) == (policy == "no gate") or policy == "loose"


@pytest.mark.parametrize(
    "tree",
    [
        *("specvlm", "skips"),
        *(pytest.param(tree, marks=pytest.mark.slow) for tree in ("dynamic", "anchors")),
    ],
)
def test_end_of_sequence_inside_a_path(models, prompts, tree, hf_greedy):
    """Each token of a greedy sequence in turn is the end."""
    prompt, kinds = prompts[0], set()
    greedy = hf_greedy(models["target"], prompt, 24)
    for end in dict.fromkeys(greedy):
        generation = _run(models, prompt, tree, draft="target", eos_ids=(end,))
        assert generation.tokens[0].tolist() == greedy[: greedy.index(end) + 1]
        kinds.add(KIND_NAMES[generation.kinds[0, -1]])
    assert kinds == {"exact", "bonus"}


@pytest.mark.parametrize("tree", ["specvlm", "dynamic", "anchors", "skips"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_max_new_tokens(models, prompts, tree, count, hf_greedy):
    generation = _run(models, prompts[0], tree, draft="target", max_new_tokens=count)
    assert generation.tokens[0].tolist() == hf_greedy(models["target"], prompts[0], count)


def test_target_as_its_own_draft(models, prompts):
    """The first choices are in a static tree, so all its levels are accepted every time."""
    longest = tuple((0,) * length for length in range(1, 64))
    for tree, depth in (("specvlm", 5), (longest, 63), ("anchors", 4), ("skips", 4)):
        whole = 1 + (depth + 1) * max(1, 66 // (depth + 1))  # the last pass is not cut
        stats = _run(models, prompts[0], tree, draft="target", max_new_tokens=whole).stats
        assert stats.tau == depth + 1
        assert stats.acceptance_by_position == [1.0] * depth


def test_sixty_four_slots(models, prompts, hf_greedy):
    wide = tuple((a, b) for a in range(7) for b in range(8)) + tuple((a,) for a in range(7))
    others = (DynamicTree(9, 7), DynamicTree(63, 1, top_k=16), AnchorTree(15, 59), SkipTree(9, 59))
    for tree in (*others, wide):
        generation = _run(models, prompts[0], tree)
        assert generation.tokens[0].tolist() == hf_greedy(models["target"], prompts[0], 24)
        if tree is wide:
            assert len(generation.trace.steps()[0].drafted) == 63


def test_a_wider_tree_accepts_more(models, prompts):
    """Otherwise nothing here would need a tree."""
    chain = _run(models, prompts[0], None, gamma=3, max_new_tokens=80).stats
    narrow, wide = (
        _run(models, prompts[0], DynamicTree(width, 3), max_new_tokens=80).stats for width in (2, 8)
    )
    assert chain.tau < narrow.tau < wide.tau


def test_specvlm_tree():
    tree = StaticTree.of(NAMED_TREES["specvlm"])
    assert len(tree.parents) == 26 and max(tree.depths) == 5
    assert [tree.depths.count(depth) for depth in range(6)] == [1, 4, 8, 8, 3, 2]
    assert DecodeConfig.specvlm().tree == "specvlm"
    assert DecodeConfig.specvlm(max_new_tokens=7).max_new_tokens == 7


def test_levels_of_a_dynamic_tree():
    assert DynamicTree(9, 7).widths == (9,) * 7
    assert DynamicTree(6, 3, top_k=2).widths == (2, 4, 6)
    assert DynamicTree(20, 3).widths == (16, 20, 20)


@pytest.mark.parametrize(
    "tree, error, message",
    [
        ("medusa", ValueError, "tree: expected one of specvlm, got 'medusa'"),
        (3, TypeError, r"tree: expected a name, paths such as .* got 3"),
        ([0, 1], TypeError, r"tree: expected a name, paths such as .* got \[0, 1\]"),
        ([(0,), (0, 1.5)], TypeError, r"ranks that are integers, got 1.5 in \(0, 1.5\)"),
        ([(0,), (-1,)], ValueError, r"ranks from 0 to 15, got -1 in \(-1,\)"),
        ([(16,)], ValueError, r"ranks from 0 to 15, got 16 in \(16,\)"),
        ([], ValueError, "tree: expected 2 to 64 slots, the root included, got 1"),
        ([(0,) * n for n in range(1, 65)], ValueError, "tree: expected 2 to 64 slots.* got 65"),
        ([(0,), (0,)], ValueError, r"tree: branches: expected .* distinct entries, got \(0,\) twi"),
        ([(0,), (1, 0)], ValueError, r"tree: branches: expected the parent \(1,\) of \(1, 0\)"),
        ([(0,), ()], ValueError, "tree: branches: expected non-empty.* got an empty one"),
    ],
)
def test_a_bad_tree_is_refused(tree, error, message):
    with pytest.raises(error, match=message):
        DecodeConfig(tree=tree)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DynamicTree(9, 8), "tree: expected 2 to 64 slots, the root included, got 73"),
        (lambda: DynamicTree(0, 2), "tree.width: expected an integer >= 1, got 0"),
        (lambda: DynamicTree(2, 0), "tree.depth: expected an integer >= 1, got 0"),
        (lambda: DynamicTree(2, 2, 17), "tree.top_k: expected an integer from 1 to 16, got 17"),
        (lambda: AnchorTree(16), "tree.siblings: expected an integer from 1 to 15, got 16"),
        (lambda: AnchorTree(2, 63), "tree.nodes: expected an integer from 1 to 62, got 63"),
        (
            lambda: DecodeConfig(gamma=60, tree=AnchorTree(2, 4)),
            r"gamma \+ tree.nodes: expected 2 to 64 slots, the root included, got 65",
        ),
        (
            lambda: DecodeConfig(tree="specvlm", draft_ngram=3),
            r"draft_ngram: expected a chain \(tree=None\), .* got tree='specvlm'",
        ),
        (
            lambda: DecodeConfig(tree=DynamicTree(2, 2), stop_at_unsure_anchors=0.5),
            r"stop_at_unsure_anchors: expected a chain",
        ),
    ],
)
def test_a_tree_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_config_with_a_tree_can_be_a_key():
    config = DecodeConfig(tree=[[0], [1], [0, 0]])
    assert config == DecodeConfig(tree=((0,), (1,), (0, 0))) and hash(config)
