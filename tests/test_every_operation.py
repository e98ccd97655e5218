"""Operations that check: what is registered, fakes, compilation, and what the checks say.

Those that only lvspec's own loop calls check nothing: `tests/ops/` has them one by one.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lvspec import ops, reference, tree
from lvspec.ops import registry
from lvspec.policy import AcceptancePolicy
from lvspec.rule import GATE_BINS

B, HQ, HKV, S, N, D, V, L, K = 3, 6, 2, 5, 19, 7, 11, 2, 5
BACKEND = ops.active_backend("cpu")
POLICY = AcceptancePolicy.lvspec(strict_ids=(4,), eos_ids=(1, 2), regret_budget=3.0)


def int32(*shape, high=5):
    return torch.randint(0, high, shape, dtype=torch.int32)


def arguments(name, dtype=torch.float32):
    """Keyword arguments of an operation, all valid."""
    visual = (torch.rand(B, N) < 0.4).byte()
    cache = {name: torch.randn(B, HKV, N, D).to(dtype) for name in ("k_cache", "v_cache")}
    kv_len = int32(B, high=N - S + 1)
    logits = torch.randn(B, S, V).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "verify_attention":
        ancestors = tree.chain_ancestors(S, batch_size=B)
        q = torch.randn(B, HQ, S, D).to(dtype)
        return {"q": q, **cache, "kv_len": kv_len, "ancestors": ancestors, "visual": visual}
    if name == "logit_stats":
        return {"logits": logits, "top_k": 3}
    if name == "accept":
        return {
            "logits": logits,
            "tokens": torch.randint(0, V, (B, S)),
            "parents": tree.chain_parents(S, batch_size=B),
            "num_slots": int32(B, high=S) + 1,
            "stats": reference.logit_stats(logits, top_k=K),
            "relevance": torch.rand(B, S) / 10,
            "policy": POLICY,
            "regret_used": torch.rand(B),
        }
    if name == "accept_sampled":
        return {
            "logits": logits,
            "draft_logits": torch.randn(B, S - 1, V + 2).to(dtype),
            "tokens": torch.randint(0, V, (B, S)),
            "num_slots": int32(B, high=S) + 1,
            "uniforms": torch.rand(B, S),
            "temperature": 0.7,
        }
    if name == "gate":
        return {
            "relevance": torch.rand(B, S) ** 4,
            "num_slots": int32(B, high=S) + 1,
            "rule": torch.tensor([POLICY.rule] * B),
            "seen": int32(B, GATE_BINS, high=3),
        }
    if name == "commit_kv":
        path = torch.tensor([[0, 1, 3, -1, -1]] * B, dtype=torch.int32)
        layers = {name: torch.stack([x] * L) for name, x in cache.items()}
        return {**layers, "kv_len": kv_len, "path": path, "num_accepted": int32(B, high=3)}
    if name == "visual_importance":
        return {
            "q": torch.randn(B, HQ, S, D).to(dtype),
            "k_cache": cache["k_cache"],
            "kv_len": kv_len,
            "visual": visual,
            "lse": torch.randn(B, HQ, S, dtype=wide),
        }
    assert name == "expand_tree"
    slots = int32(B, S, high=64)
    return {
        "logits": logits,
        "log_probs": torch.randn(B, S, dtype=wide),
        "slots": slots,
        "width": 4,
    }


OF_THE_LOOP = {"append", "linear_add_", "norm_gated_linear", "norm_linear", "rms_norm"}
OF_THE_LOOP |= {"rotary_angles", "rotate_and_write", "silu_multiply"}
NAMES = sorted(set(registry.OPERATIONS) & set(ops.__all__) - OF_THE_LOOP)
PER_SLOT = ("logits", "tokens", "uniforms")


class Handed(torch.utils._python_dispatch.TorchDispatchMode):
    """What arguments the checked functions hand to the operations."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "lvspec":
            self.calls.append((operation, args))
        return operation(*args, **(kwargs or {}))


def handed_over(name, **changes):
    with Handed() as handed:
        getattr(ops, name)(**arguments(name) | changes)
    (call,) = handed.calls
    return call


def variants(name):
    yield {}
    if name == "verify_attention":
        yield {"scores": False, "scale": 0.5}
        visual = (torch.rand(B, N) < 0.4).byte()
        yield {"plan": ops.plan_splits(visual, int32(B))}
        pages = {cache: torch.randn(9, HKV, 4, D) for cache in ("k_cache", "v_cache")}
        visual = torch.zeros(B, 12, dtype=torch.uint8)
        yield {**pages, "block_table": int32(B, 3), "kv_len": int32(B), "visual": visual}
    if name == "accept":
        strict = AcceptancePolicy.strict()
        yield {"policy": strict, "relevance": None, "regret_used": None}
        for preset in ("fly", "typical"):
            yield {"policy": AcceptancePolicy.preset(preset)}
        yield arguments(name, ops.float_dtypes("cpu")[-1])
    if name == "accept_sampled":
        yield {"draft_logits": None, "temperature": 1}
        yield arguments(name, ops.float_dtypes("cpu")[-1])
        yield arguments(name, torch.bfloat16) | {"draft_logits": torch.randn(B, S - 1, V - 1)}
        one = {key: x[:, :1] for key, x in arguments(name).items() if key in PER_SLOT}
        yield {**one, "draft_logits": torch.randn(B, 0, V)}
    if name == "commit_kv":
        yield {cache: torch.randn(B, HKV, N, D) for cache in ("k_cache", "v_cache")}
    if name == "gate":
        yield {"relevance": torch.rand(B, S, dtype=torch.float64) ** 4}
    if name in ("logit_stats", "expand_tree", "visual_importance"):
        yield arguments(name, torch.float64)
        yield arguments(name, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    for changes in variants(name):
        operation, args = handed_over(name, **changes)
        torch.library.opcheck(operation, args)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name):
    for changes in variants(name):
        given = arguments(name) | changes
        ours, theirs = (
            {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
            for _ in range(2)
        )
        got = getattr(ops, name)(**ours)
        expected = getattr(reference, name)(**theirs)
        assert type(got) is type(expected)
        if name == "commit_kv":
            got, expected = ((x["k_cache"], x["v_cache"]) for x in (ours, theirs))
        for x, y in zip(got, expected):
            if y is None:
                assert x is None
            elif y.is_floating_point() and BACKEND != "reference":  # it rounds otherwise
                torch.testing.assert_close(x, y, equal_nan=True)
            else:
                assert torch.equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_fakes(name):
    """Shapes, types and strides without values; nothing is read."""
    for changes in variants(name):
        operation, args = handed_over(name, **changes)
        expected = operation(*args)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
            got = operation(*fakes)
        if expected is None:
            assert got is None
            continue
        if isinstance(expected, torch.Tensor):
            got, expected = [got], [expected]
        for x, y in zip(got, expected, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole(name, backend):
    torch.compiler.reset()
    given = arguments(name)
    ours, theirs = (
        {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in given.items()}
        for _ in range(2)
    )
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend=backend)
    got = compiled(**ours)
    expected = getattr(ops, name)(**theirs)
    if name == "commit_kv":
        got, expected = ((x["k_cache"], x["v_cache"]) for x in (ours, theirs))
    assert all(map(torch.equal, got, expected))


def policy_tensors(**changes):
    """What is handed to accept of its policy."""
    operation, args = handed_over("accept", **changes)
    names = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(names, args))
    return [given[name] for name in ("rule", "strict_ids", "eos_ids")]


def test_tensors_of_a_policy_are_made_once():
    for first, second in zip(policy_tensors(), policy_tensors(), strict=True):
        assert first is second


def test_accept_hands_over_the_rule():
    """A row of numbers a sequence, in the order of the rule's fields; ids padded with -1."""
    rule, strict_ids, eos_ids = policy_tensors()
    assert rule.tolist() == [list(POLICY.rule)] * B
    assert strict_ids.tolist() == [[4]] * B and eos_ids.tolist() == [1, 2]
    policies = [POLICY, AcceptancePolicy.fly(), AcceptancePolicy(strict_ids=(7, 3))]
    rules = ops.Rules.of(policies, (9,), torch.device("cpu"), num_strict_ids=3)
    rule, strict_ids, eos_ids = policy_tensors(policy=rules)
    assert rule.tolist() == [list(policy.rule) for policy in policies]
    assert strict_ids.tolist() == [[4, -1, -1], [-1] * 3, [3, 7, -1]]
    assert eos_ids.tolist() == [9]
    assert ops.Rules.of(policies, (), torch.device("cpu")).strict_ids.shape == (3, 2)
    assert ops.Rules.of([], (), torch.device("cpu")).numbers.shape == (0, len(POLICY.rule))


def changed(name, key, change):
    value = arguments(name)[key]
    return {key: change(value)}


def rules(policy, **changes):
    """The tensors of a policy, some of them changed."""
    made = ops.Rules.of([policy] * B, policy.eos_ids, torch.device("cpu"))
    return made._replace(**{name: change(getattr(made, name)) for name, change in changes.items()})


# operation, argument, what is done to it, what the message says
MISTAKES = [
    (
        "verify_attention",
        "q",
        lambda x: x[0],
        r"q: expected shape \[B, Hq, S, D\], got \(6, 5",
    ),
    (
        "verify_attention",
        "q",
        lambda x: x.int(),
        "q: expected dtype float32 or .*, got torch.int",
    ),
    ("verify_attention", "q", lambda x: x[:, :5], "q: expected a multiple of Hkv = 2 heads, got 5"),
    ("verify_attention", "q", lambda x: x[:, :, :0], "q: expected 1 to 64 slots S, got 0"),
    ("verify_attention", "q", lambda x: x[:0], "q: expected at least one sequence, got 0"),
    ("verify_attention", "k_cache", lambda x: x[0], "k_cache: expected 4 dimensions, got"),
    (
        "verify_attention",
        "k_cache",
        lambda x: x.half(),
        "k_cache: expected dtype float32 or float8_e4m3fn, got",
    ),
    (
        "verify_attention",
        "k_cache",
        lambda x: x[..., :6],
        r"k_cache: expected shape \(3, 2, 19, 7",
    ),
    ("verify_attention", "v_cache", lambda x: x[:, :1], r"v_cache: .*\(3, 2, 19, 7\), got \(3, 1,"),
    (
        "verify_attention",
        "v_cache",
        lambda x: x.to("meta"),
        "v_cache: expected device cpu, got",
    ),
    (
        "verify_attention",
        "kv_len",
        lambda x: x.long(),
        "kv_len: expected dtype int32, got",
    ),
    ("verify_attention", "ancestors", lambda x: x.int(), "ancestors: expected dtype int64, got"),
    ("verify_attention", "ancestors", lambda x: x[:, :4], r"ancestors: expected shape \(3, 5\)"),
    (
        "verify_attention",
        "visual",
        lambda x: x.bool(),
        "visual: expected dtype uint8, got",
    ),
    ("verify_attention", "visual", lambda x: x[:, :8], r"visual: expected shape \(3, 19\)"),
    ("logit_stats", "logits", lambda x: x[0], r"logits: expected shape \[B, S, V\], got \(5, 11\)"),
    ("logit_stats", "logits", lambda x: x.long(), "logits: expected dtype"),
    ("logit_stats", "logits", lambda x: x[..., :2], "top_k: expected 1 to 2 for a vocabulary of 2"),
    ("logit_stats", "top_k", lambda x: 0, "top_k: expected 1 to 11 for a vocabulary of 11, got 0"),
    ("accept", "logits", lambda x: x[0], "logits: expected shape"),
    (
        "accept",
        "logits",
        lambda x: x.double(),
        "stats.top_logits: expected dtype float64, got|"
        "logits: expected dtype float32 or bfloat16 or float16, got",  # not of the reference
    ),
    ("accept", "tokens", lambda x: x.int(), "tokens: expected dtype int64, got torch.int"),
    ("accept", "parents", lambda x: x[0], r"parents: expected shape \(3, 5\), got \(5,\)"),
    ("accept", "num_slots", lambda x: x.long(), "num_slots: expected dtype int32"),
    ("accept", "stats", lambda x: x._replace(lse=x.lse[0]), r"stats.lse: expected shape \(3, 5\)"),
    (
        "accept",
        "stats",
        lambda x: x._replace(top_ids=x.top_ids[..., :2], top_logits=x.top_logits[..., :2]),
        "stats: expected the 5 best tokens per row, which the policy needs, got 2",
    ),
    ("accept", "relevance", lambda x: x.half(), "relevance: expected dtype float32 or float64"),
    ("accept", "relevance", lambda x: None, "relevance: expected a tensor, .*anchor_threshold"),
    (
        "accept",
        "policy",
        lambda x: rules(x, numbers=lambda y: y[:2]),
        r"policy.numbers: .*\(3, 19\)",
    ),
    (
        "accept",
        "policy",
        lambda x: rules(x, numbers=lambda y: y.double()),
        "policy.numbers: .*float32",
    ),
    (
        "accept",
        "policy",
        lambda x: rules(x, strict_ids=lambda y: y[0]),
        r"policy.strict_ids: .*\[B, E\]",
    ),
    (
        "accept",
        "policy",
        lambda x: rules(x, eos_ids=lambda y: y.int()),
        "policy.eos_ids: .*dtype int64",
    ),
    ("gate", "relevance", lambda x: x[0], r"relevance: expected shape \[B, S\], got \(5,\)"),
    ("gate", "relevance", lambda x: x[:, :0], "relevance: expected 1 to 64 slots S, got 0"),
    ("gate", "relevance", lambda x: x.half(), "relevance: expected dtype float32 or float64, got"),
    ("gate", "num_slots", lambda x: x.long(), "num_slots: expected dtype int32, got"),
    ("gate", "rule", lambda x: x[:, :-1], r"rule: expected shape \(3, 19\), got \(3, 18\)"),
    ("gate", "rule", lambda x: x.double(), "rule: expected dtype float32, got"),
    ("gate", "seen", lambda x: x[:, :63], r"seen: expected shape \(3, 64\), got \(3, 63\)"),
    ("gate", "seen", lambda x: x.long(), "seen: expected dtype int32, got"),
    ("accept", "regret_used", lambda x: x[:2], r"regret_used: expected shape \(3,\), got \(2,\)"),
    (
        "accept_sampled",
        "logits",
        lambda x: x[0],
        r"logits: expected shape \[B, S, V\], got \(5, 11",
    ),
    ("accept_sampled", "logits", lambda x: x.long(), "logits: expected dtype"),
    ("accept_sampled", "logits", lambda x: x[:, :0], "logits: expected 1 to 64 slots S, got 0"),
    ("accept_sampled", "logits", lambda x: x[..., :0], "logits: .* V of at least 1, got 0"),
    (
        "accept_sampled",
        "draft_logits",
        lambda x: x[0],
        r"draft_logits: expected shape \[B, S - 1, Vd\], got \(4, 13\)",
    ),
    (
        "accept_sampled",
        "draft_logits",
        lambda x: x[:, :3],
        r"draft_logits: expected shape \(3, 4, 13\), got \(3, 3, 13\)",
    ),
    ("accept_sampled", "draft_logits", lambda x: x[..., :0], "draft_logits: .* Vd of at least 1"),
    ("accept_sampled", "draft_logits", lambda x: x.int(), "draft_logits: expected dtype float32"),
    ("accept_sampled", "tokens", lambda x: x.int(), "tokens: expected dtype int64, got"),
    ("accept_sampled", "num_slots", lambda x: x[:2], r"num_slots: expected shape \(3,\), got"),
    ("accept_sampled", "uniforms", lambda x: x.double(), "uniforms: expected dtype float32, got"),
    ("accept_sampled", "uniforms", lambda x: x[0], r"uniforms: expected shape \(3, 5\), got"),
    ("accept_sampled", "temperature", lambda x: 0.0, "temperature: .* number > 0, got 0.0"),
    ("accept_sampled", "temperature", lambda x: float("inf"), "temperature: expected a finite"),
    ("accept_sampled", "temperature", lambda x: float("nan"), "temperature: .*, got nan"),
    ("commit_kv", "k_cache", lambda x: x[0, 0], r"k_cache: expected shape \[L, B, Hkv, N, D\] or"),
    ("commit_kv", "v_cache", lambda x: x[:1], r"v_cache: expected shape \(2, 3, 2, 19, 7\)"),
    ("commit_kv", "path", lambda x: x.long(), "path: expected dtype int32"),
    ("commit_kv", "path", lambda x: x[0], r"path: expected shape \[B, S\], got \(5,\)"),
    ("commit_kv", "path", lambda x: x.repeat(1, 4), "k_cache: .* N of at least S = 20, got 19"),
    ("commit_kv", "num_accepted", lambda x: x[:2], r"num_accepted: expected shape \(3,\)"),
    (
        "visual_importance",
        "q",
        lambda x: x[:, :3],
        "q: .* a multiple of Hkv = 2 heads, got 3",
    ),
    ("visual_importance", "lse", lambda x: x.double(), "lse: expected dtype float32, got"),
    ("visual_importance", "visual", lambda x: x[:1], r"visual: expected shape \(3, 19\)"),
    ("expand_tree", "width", lambda x: 56, r"width: expected 1 to W \* top_k = 55 nodes, got 56"),
    ("expand_tree", "log_probs", lambda x: x[..., None], r"log_probs: expected shape \(3, 5\)"),
    ("expand_tree", "slots", lambda x: x.long(), "slots: expected dtype int32"),
]


@pytest.mark.parametrize(("name", "key", "change", "message"), MISTAKES)
def test_messages(name, key, change, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(**arguments(name) | changed(name, key, change))


def test_messages_of_plan_and_pages():
    plan = ops.plan_splits(torch.zeros(B, N, dtype=torch.uint8), int32(B))
    with pytest.raises(ValueError, match=r"plan.end: expected shape \(3, "):
        handed_over("verify_attention", plan=plan._replace(end=plan.end[:, :-1]))
    with pytest.raises(ValueError, match=r"plan.start: expected shape \[B, P\]"):
        handed_over("verify_attention", plan=plan._replace(start=plan.start[0]))
    with pytest.raises(ValueError, match=r"block_table: expected shape \[B, max_pages\]"):
        handed_over("verify_attention", block_table=int32(3))
    with pytest.raises(ValueError, match="block_table: expected dtype int32"):
        handed_over("verify_attention", block_table=int32(3, 2).long())
    with pytest.raises(ValueError, match=r"visual: expected shape \(3, 38\)"):
        handed_over("verify_attention", block_table=int32(3, 2))


def test_capacity_below_the_slots():
    small = {cache: torch.randn(B, HKV, 4, D) for cache in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match="k_cache: expected a capacity N of at least S = 5, got 4"):
        handed_over("verify_attention", **small)
