"""A pass of lvspec's own: the same numbers as HF's forward."""

import pytest
import torch
from passes import TREE, Names, assert_same, check, clip, step, text_of
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import DynamicCache

from lvspec import AcceptancePolicy, DecodeConfig, generate, ops
from lvspec.models.attention import lvspec_attention_on
from lvspec.models.cache import Beginning
from lvspec.models.cpu_pass import max_rows
from lvspec.models.hf_names import CACHE
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.tree import ancestors_from_parents, chain_ancestors, depths

HAS_CPP = ops.active_backend("cpu") == "cpp"
ONE = "own: one operation" if HAS_CPP else "own"
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="needs the C++ operations")
as_others = pytest.mark.filterwarnings("ignore:lvspec. passes of the:RuntimeWarning")
TYPES = [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.05)]
every_type = pytest.mark.parametrize(("dtype", "atol"), TYPES, ids=lambda x: str(x)[6:])


@pytest.fixture
def on_the_reference(monkeypatch):
    """Many operations, by their specifications: what a CUDA device's kernels are compared with."""
    for name in ("lvspec.ops.model_parts", "lvspec.ops"):
        monkeypatch.setattr(f"{name}.active_backend", lambda device_type: "reference")


@every_type
def test_a_tree(target, make_prompt, dtype, atol):
    names = check(target.to(dtype), [clip(make_prompt, dtype=dtype)] * 2, atol)
    is_one = dtype == torch.float32 and HAS_CPP
    assert names.count("text_pass") == int(is_one)
    assert names.count("verify_attention") == (0 if is_one else 2)
    assert Model(target, "target").made.passes == ("own: one operation" if is_one else "own")


@every_type
def test_a_tree_on_the_reference(target, make_prompt, on_the_reference, dtype, atol):
    names = check(target.to(dtype), [clip(make_prompt, dtype=dtype)] * 2, atol)
    assert "text_pass" not in names and names.count("verify_attention") == 2
    assert "cat" in names, "weights that do not stand together are multiplied apart"


@pytest.mark.parametrize(
    ("dtype", "atol"), [TYPES[1], (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_a_tree_as_on_a_gpu(target, make_prompt, as_on_a_gpu, dtype, atol):
    """One operation for the product of all projections, and so on: seven a layer, and attention."""
    target.to(dtype)
    theirs = step(target, [clip(make_prompt, dtype=dtype)] * 2, "none")
    ours = step(target, [clip(make_prompt, dtype=dtype)] * 2)
    assert_same(ours, theirs, atol)
    with torch.no_grad():
        names = run_names(target, make_prompt, dtype)
    counts = {name: names.count(name) for name in names}
    expected = {
        "norm_linear": 2,
        "rotate_and_write": 2,
        "verify_attention": 2,
        "linear_add_": 4,
        "norm_gated_linear": 2,
        "rms_norm": 1,
    }
    if target.model.language_model.rotary_emb.inv_freq.dtype == torch.float32:
        expected["rotary_angles"] = 1
    assert counts == counts | expected
    assert not {"text_pass", "silu_multiply", "scatter_", "silu"} & counts.keys()
    assert not {"_local_scalar_dense", "nonzero", "equal"} & counts.keys(), "nothing is read back"


def run_names(hf, make_prompt, dtype):
    """Of a pass without data, where specifications do not run and a value that is read fails."""
    model = Model(hf, "target")
    assert model.made.passes == "own"
    cache = model.new_cache(batch_size=2, capacity=70, num_slots=len(TREE))
    given = torch.ones(2, len(TREE), dtype=torch.long), depths(TREE).long()
    ancestors = ancestors_from_parents(TREE.repeat(2, 1))
    with model.active(), FakeTensorMode(allow_non_fake_inputs=True), Names() as names:
        output = model.step(*given, ancestors, cache, scores=True)
    assert type(output.logits) is FakeTensor and output.logits.shape == (2, len(TREE), 256)
    assert output.peaks.shape == (2, 2, 4, len(TREE))
    return names.seen


@torch.no_grad()
def test_depths_of_any_integers(target):
    """Of all sequences or of each."""
    model, outputs = Model(target, "target"), []
    for kind in (torch.int64, torch.int32):
        for rows in (depths(TREE).to(kind), depths(TREE).to(kind).repeat(2, 1)):
            cache = model.new_cache(batch_size=2, capacity=70, num_slots=len(TREE))
            cache.positions.copy_(torch.arange(cache.positions.shape[2]))
            tokens = torch.arange(8, 8 + 2 * len(TREE)).view(2, -1)
            ancestors = ancestors_from_parents(TREE.repeat(2, 1))
            outputs.append(model.step(tokens, rows, ancestors, cache).logits)
    assert all(logits.equal(outputs[0]) for logits in outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "atol"), [TYPES[1], (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_a_tree_on_a_device(target, make_prompt, dtype, atol):
    prompt = clip(make_prompt, dtype=dtype)
    prompt = {name: x.cuda() if torch.is_tensor(x) else x for name, x in prompt.items()}
    names = check(target.to("cuda", dtype), [prompt] * 2, atol)
    assert names.count("norm_linear") == names.count("norm_gated_linear") == 2
    assert names.count("linear_add_") == 4 and names.count("rotate_and_write") == 2


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 7, 8, 12, 13, 16, 17])
def test_any_number_of_rows(target, make_prompt, slots, batch_size):
    prompts = [clip(make_prompt, seed, words=5 + seed) for seed in range(batch_size)]
    parents = torch.arange(-1, slots - 1, dtype=torch.int32)
    assert chain_ancestors(slots, batch_size=1, device="cpu").equal(
        ancestors_from_parents(parents[None])
    )
    names = check(
        target, prompts, parents=parents, tokens=torch.randint(8, 186, (batch_size, slots))
    )
    assert ("text_pass" in names) == HAS_CPP


@needs_cpp
def test_many_rows_are_many_operations(target, make_prompt, monkeypatch):
    """Behind what the C++ products are good for."""
    monkeypatch.setattr("lvspec.models.cpu_pass.max_rows", lambda: 2 * len(TREE) - 1)
    names = check(target, [clip(make_prompt)] * 2)
    assert "text_pass" not in names and names.count("rotate_and_write") == 2


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_cache(target, make_prompt, batch_size, scores):
    """Other prompts, other tokens, caches of other capacities, and one plan."""
    plans = []
    for seed, capacity in ((0, 70), (1, 41), (2, 99)):
        prompts = [clip(make_prompt, seed)] * batch_size
        tokens = torch.randint(8, 186, (batch_size, len(TREE)))
        check(target, prompts, capacity=capacity, scores=scores, tokens=tokens)
        plans.append(Model(target, "target").made.plan)
    assert plans[0] is not None and plans[0] is plans[1] is plans[2]


@pytest.mark.parametrize("fixture", ["on_the_reference", "as_on_a_gpu", None])
def test_hf_code_runs_if_that_is_asked_for(target, make_prompt, request, fixture):
    if fixture is not None:
        request.getfixturevalue(fixture)
    _, _, names = step(target, clip(make_prompt), "none")
    assert {"rsqrt", "silu", "cos"} <= set(names)
    assert not {"text_pass", "rms_norm", "rotate_and_write"} & set(names)
    assert Model(target, "target", fuse="none").made.passes == 'HF\'s: fuse="none"'


@every_type
@pytest.mark.parametrize(
    "parts", [(7,), (5, ("video", 2, 6, 4), 3), (2, ("image", 4, 8), 1), (90,), (150,)]
)
def test_a_prompt(target, make_prompt, parts, dtype, atol):
    """HF's own logits of the last row and its cache; the last layer computes that row alone."""
    target.to(dtype)
    prompt, model = make_prompt(*parts, dtype=dtype), Model(target, "target")
    length, theirs = prompt["input_ids"].shape[1], DynamicCache()
    ours = model.new_cache(batch_size=3, capacity=length + 9, num_slots=1)
    before = ours.k.clone()
    with torch.inference_mode():
        assert model.made.plan is not None
        with Names() as names:
            logits = model.prefill(check_inputs(model, prompt), ours, 1)
        target.model.rope_deltas = None
        wanted = target(**prompt, **{CACHE: theirs}).logits[:, -1]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=atol)
    # On a CPU all layers but the last are one operation, in pieces of 64 rows.
    is_cpp = HAS_CPP and dtype == torch.float32
    at_once = -(-length // 64) if is_cpp and length <= max_rows() else 0
    assert names.seen.count("text_pass") == at_once
    assert names.seen.count("rotate_and_write") == (1 if at_once else 2 if is_cpp else 0)
    for layer, (k, v) in enumerate(zip(ours.k, ours.v, strict=True)):
        keys, values = theirs.layers[layer].keys[0], theirs.layers[layer].values[0]
        torch.testing.assert_close(k[1, :, :length], keys, rtol=0, atol=atol)
        torch.testing.assert_close(v[1, :, :length], values, rtol=0, atol=atol)
    before[:, 1, :, :length] = ours.k[:, 1, :, :length]
    assert ours.k.equal(before), "nothing else of the cache is written"


@every_type
@pytest.mark.parametrize("fuse", ["kernels", "none"])
@pytest.mark.parametrize("behind", [1, 4, 30])
def test_a_prompt_behind_its_beginning(target, make_prompt, fuse, behind, dtype, atol):
    """What is copied from another place and read behind it is as if all had been read."""
    target.to(dtype)
    prompt = make_prompt(5, ("video", 2, 6, 4), behind, dtype=dtype)
    model = Model(target, "target", fuse=fuse)
    length = prompt["input_ids"].shape[1]
    other = {**prompt, "input_ids": prompt["input_ids"].clone()}
    other["input_ids"][:, -behind:] = 9  # another question
    whole, copied = (
        model.new_cache(batch_size=3, capacity=length + 9, num_slots=1) for _ in range(2)
    )
    with torch.inference_mode():
        wanted = model.prefill(check_inputs(model, prompt), whole, 1)
        model.prefill(check_inputs(model, other), copied, 2)
        before, beginning = copied.k.clone(), Beginning(2, length - behind)
        logits = model.prefill(check_inputs(model, prompt), copied, 1, beginning=beginning)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=atol)
    for name in ("k", "v", "positions"):
        ours, theirs = (getattr(cache, name)[:, 1] for cache in (copied, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert copied.kv_len[1] == whole.kv_len[1] and copied.visual[1].equal(whole.visual[1])
    assert copied.k[:, ::2].equal(before[:, ::2]), "nothing else of the cache is written"


@pytest.mark.parametrize("policy", [AcceptancePolicy.strict(), AcceptancePolicy.lvspec()])
def test_generate_is_the_same(random_pair, noisy_draft, make_prompt, policy):
    config = {"gamma": 4, "max_new_tokens": 24, "eos_ids": ()}
    ours, theirs = (
        generate(
            *(random_pair[0], noisy_draft, clip(make_prompt)),
            policy=policy,
            config=DecodeConfig(**config, fuse=fuse),
        )
        for fuse in ("kernels", "none")
    )
    assert torch.equal(ours.tokens, theirs.tokens)
    relevance = ours.relevance, theirs.relevance
    torch.testing.assert_close(*relevance, rtol=0, atol=2e-5, equal_nan=True)
    assert ours.stats.passes == {"target": ONE, "draft": ONE}
    assert set(theirs.stats.passes.values()) == {'HF\'s: fuse="none"'}


@as_others
def test_a_pass_in_hf_attention_as_it_was(target, make_prompt):
    """A model that has no plan is set to lvspec's attention in a step, and to its own behind it."""
    text_of(target).set_attn_implementation("eager")
    check(target, clip(make_prompt))
    assert text_of(target).config._attn_implementation == "eager"
    with lvspec_attention_on(text_of(target)):
        check(target, clip(make_prompt))
