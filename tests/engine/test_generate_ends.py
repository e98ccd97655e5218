"""How a generation ends other than by its last token: interrupted, by NaN; and what it leaves."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from lvspec import (
    AcceptancePolicy,
    DecodeConfig,
    GenerationInterrupted,
    NonFiniteLogits,
    generate,
)


class _Stop(BaseStreamer):
    """Raises at the given call of `put`."""

    def __init__(self, call, error):
        self.left, self.error = call, error

    def put(self, value):
        if self.left == 0:
            raise self.error
        self.left -= 1

    def end(self):
        raise AssertionError("a generation that fails has no end to announce")


@pytest.fixture
def inputs(make_prompt):
    return make_prompt(3, ("video", 4, 6, 6), 5)


@pytest.fixture
def run(random_pair, inputs):
    """Strict decoding with the target as its own draft: full acceptance, 6 tokens an iteration."""

    def run(target=random_pair[0], draft=random_pair[0], inputs=inputs, **kwargs):
        config = DecodeConfig(gamma=5, max_new_tokens=24, eos_ids=())
        policy = AcceptancePolicy.strict()
        return generate(target, draft, inputs, policy=policy, config=config, **kwargs)

    return run


@pytest.fixture
def at_lm_head(random_pair):
    """`at_lm_head(action)`: a target with `action(call, logits)` at its head; call 0 is prefill."""

    def install(action):
        target = copy.deepcopy(random_pair[0])
        calls = iter(range(1000))
        target.lm_head.register_forward_hook(lambda *args: action(next(calls), args[-1]))
        return target

    return install


def _attention_of(model):
    configs = (model.config, model.config.text_config, model.config.vision_config)
    used = (model.model.language_model.config, model.model.visual.config)
    return [config._attn_implementation for config in (*configs, *used)]


def _check_partial(generation, tokens, prompt):
    count = len(tokens)
    assert generation.tokens.tolist() == [tokens]
    assert generation.sequences.tolist() == [prompt["input_ids"][0].tolist() + tokens]
    assert generation.kinds.shape == generation.relevance.shape == (1, count)
    counts = generation.stats.counts
    assert sum(counts[name] for name in ("exact", "loose", "shift", "bonus")) == count
    assert generation.to_dict()["tokens"] == tokens


@pytest.mark.parametrize("call, count", [(0, 1), (1, 1), (2, 7), (4, 19)])
def test_interrupted_by_the_streamer(random_pair, run, inputs, call, count):
    before = _attention_of(random_pair[0])
    tokens = run().tokens[0].tolist()
    with pytest.raises(GenerationInterrupted, match=f"after {count} tokens") as caught:
        run(streamer=_Stop(call, KeyboardInterrupt()))
    assert isinstance(caught.value, KeyboardInterrupt)
    _check_partial(caught.value.generation, tokens[:count], inputs)
    assert _attention_of(random_pair[0]) == before
    assert run().tokens[0].tolist() == tokens


@pytest.mark.parametrize("call, count", [(0, 0), (1, 1), (3, 13)])
def test_interrupted_in_a_forward(run, inputs, at_lm_head, call, count):
    def interrupt(current, logits):
        if current == call:
            raise KeyboardInterrupt

    tokens = run().tokens[0].tolist()
    target = at_lm_head(interrupt)
    with pytest.raises(GenerationInterrupted) as caught:
        run(target=target)
    _check_partial(caught.value.generation, tokens[:count], inputs)
    assert _attention_of(target)[-2] == "sdpa"


def test_other_errors_pass_through(random_pair, run):
    before = _attention_of(random_pair[0])
    with pytest.raises(RuntimeError, match="disk full"):
        run(streamer=_Stop(2, RuntimeError("disk full")))
    assert _attention_of(random_pair[0]) == before


@pytest.mark.parametrize("row, whole", [(0, True), (3, True), (3, False), (5, False)])
def test_nan_in_a_row_of_the_path(run, inputs, at_lm_head, row, whole):
    def spoil(call, logits):
        if call == 3:
            logits[0, row, slice(None) if whole else 77] = torch.nan

    tokens = run().tokens[0].tolist()
    target = at_lm_head(spoil)
    with pytest.raises(NonFiniteLogits, match=rf"target: .* NaN at iteration 2, row {row}; 13 tok"):
        run(target=target)
    target = at_lm_head(spoil)
    with pytest.raises(NonFiniteLogits) as caught:
        run(target=target)
    _check_partial(caught.value.generation, tokens[:13], inputs)
    assert _attention_of(target)[-2] == "sdpa"


def test_nan_behind_the_path_does_not_matter(random_pair, run, at_lm_head):
    def spoil(call, logits):
        if call > 0 and logits.shape[1] > 1:
            logits[0, 5] = torch.nan

    wanted = run(draft=random_pair[1])
    assert max(wanted.stats.num_accepted) < 5
    generation = run(target=at_lm_head(spoil), draft=random_pair[1])
    assert generation.tokens.equal(wanted.tokens)


def test_nan_without_a_draft(run, inputs, at_lm_head):
    def spoil(call, logits):
        if call == 5:
            logits[..., 0] = torch.nan

    tokens = run().tokens[0].tolist()
    with pytest.raises(NonFiniteLogits, match="iteration 4, row 0; 5 tokens") as caught:
        run(target=at_lm_head(spoil), draft=None)
    _check_partial(caught.value.generation, tokens[:5], inputs)


def test_nan_at_the_prompt(run, inputs, at_lm_head):
    def spoil(call, logits):
        logits.fill_(torch.nan)

    with pytest.raises(NonFiniteLogits, match="NaN at the prompt; 0 tokens") as caught:
        run(target=at_lm_head(spoil))
    _check_partial(caught.value.generation, [], inputs)


def test_nan_of_the_draft_costs_speed_only(run, at_lm_head):
    def spoil(call, logits):
        if call == 2:
            logits.fill_(torch.nan)

    generation = run(draft=at_lm_head(spoil))
    assert generation.tokens.equal(run().tokens)
    assert generation.stats.num_accepted[0] < 5


def test_models_are_as_before(random_pair, run, make_prompt, hf_greedy):
    target, draft = random_pair
    clip = make_prompt(2, ("video", 5, 4, 4), 3)
    before = [(_attention_of(model), hf_greedy(model, clip, 20)) for model in (target, draft)]
    run(draft=draft)
    after = [(_attention_of(model), hf_greedy(model, clip, 20)) for model in (target, draft)]
    assert after == before


def test_no_positions_are_left_over(random_pair, run, make_prompt, hf_greedy):
    """HF keeps `rope_deltas` in the model: those of one clip must not reach the next."""
    clips = [
        make_prompt(2, ("video", 9, 4, 4), 1, seconds=4.0),
        make_prompt(2, ("video", 2, 6, 6), 7, seed=1),
        make_prompt(8, seed=2),
    ]
    wanted = [hf_greedy(copy.deepcopy(random_pair[0]), clip, 24) for clip in clips]
    for first, second in ((0, 1), (1, 2), (2, 0), (1, 1)):
        run(inputs=clips[first])
        assert hf_greedy(random_pair[0], clips[second], 24) == wanted[second]
        assert run(inputs=clips[first]).tokens[0].tolist() == wanted[first]


def test_positions_kept_in_the_model_are_neither_read_nor_written(random_pair, run, monkeypatch):
    wanted, stale = run().tokens, torch.tensor([[777]])
    monkeypatch.setattr(random_pair[0].model, "rope_deltas", stale)
    assert run().tokens.equal(wanted)
    assert random_pair[0].model.rope_deltas is stale


def test_result_is_fit_for_training(random_pair, run):
    """Not inference tensors: a caption may become a label, or be changed."""
    generation = run()
    target = copy.deepcopy(random_pair[0])
    target(input_ids=generation.tokens, labels=generation.tokens).loss.backward()
    generation.tokens += 1
    generation.relevance.nan_to_num_()


def _in_a_worker(error):
    raise error


def test_errors_pass_between_processes(random_pair, inputs, at_lm_head, run):
    """As from a pool of workers, with what was generated before."""
    errors = []
    for action, kind in (
        (lambda call, logits: logits * torch.nan if call > 2 else None, NonFiniteLogits),
        (None, GenerationInterrupted),
    ):
        stop = {} if action else {"streamer": _Stop(3, KeyboardInterrupt())}
        with pytest.raises(kind) as caught:
            run(target=at_lm_head(action) if action else random_pair[0], **stop)
        errors.append(caught.value)
    errors[0].index = 3
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        for error in errors:
            with pytest.raises(type(error)) as caught:
                pool.submit(_in_a_worker, error).result(timeout=120)
            for found in (caught.value, copy.copy(error), copy.deepcopy(error)):
                assert type(found) is type(error) and str(found) == str(error)
                mine, theirs = (
                    each.generation if isinstance(each, NonFiniteLogits) else each.generations[0]
                    for each in (found, error)
                )
                assert mine.tokens.tolist() == theirs.tokens.tolist() != [[]]
                assert mine.stats.to_dict() == theirs.stats.to_dict()
    assert pickle.loads(pickle.dumps(errors[0])).index == 3
