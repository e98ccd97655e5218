"""Nothing is left behind on a model, however a call ends, and threads may share it."""

import copy
import gc
import sys
import threading

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from lvspec import AcceptancePolicy, DecodeConfig, Decoder, generate, generate_many
from lvspec.engine.errors import GenerationInterrupted, NonFiniteLogits

COUNT = 9
STRICT = AcceptancePolicy.strict()
CAPTURE = pytest.mark.parametrize("capture", [False, True])


def config(capture=False, **options):
    return DecodeConfig(
        **{"gamma": 3, "max_new_tokens": COUNT, "eos_ids": (), **options}, capture=capture
    )


def plain(value):
    """What can be compared, tensors by place and version."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value._version
    if isinstance(value, PretrainedConfig):
        return plain(vars(value))
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def state(*models):
    """All that Python and torch know of the models, and of the thread."""
    found = [
        plain(vars(module)) | {"class": type(module)} for hf in models for module in hf.modules()
    ]
    surroundings = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return found, surroundings, torch.get_rng_state().tolist()


@pytest.fixture
def models(random_pair, make_prompt, hf_greedy):
    """(target, draft) that HF has decoded with, so that they hold positions of that."""
    found = copy.deepcopy(random_pair[0]), copy.deepcopy(random_pair[0])
    for hf in found:
        hf_greedy(hf, make_prompt(3, ("video", 6, 6, 4), 2), 2)
        assert hf.model.rope_deltas is not None
    return found


@pytest.fixture
def prompt(make_prompt):
    return make_prompt(5, ("video", 2, 6, 4), 3)


class Streamer:
    """Raises at the third piece."""

    def __init__(self, error):
        self.error, self.count = error, 0

    def put(self, piece):
        self.count += 1
        if self.count == 3:
            raise self.error

    def end(self):
        pass


def to_the_end(models, prompt, **options):
    generate(*models, prompt, **options)


def interrupted(models, prompt, **options):
    with pytest.raises(GenerationInterrupted):
        generate(*models, prompt, streamer=Streamer(KeyboardInterrupt()), **options)


def failed(models, prompt, **options):
    with pytest.raises(OSError):
        generate(*models, prompt, streamer=Streamer(OSError()), **options)


def failed_in_a_processor(models, prompt, **options):
    def processor(ids, scores):
        if ids.shape[1] > prompt["input_ids"].shape[1] + 4:
            raise OSError
        return scores

    with pytest.raises(OSError):
        generate(*models, prompt, logits_processor=[processor], **options)


def failed_in_a_forward(models, prompt, **options):
    """Of HF's, in the prompt and behind it."""
    for calls_before in (0, 1, 2):
        calls = []

        def fail(module, args, calls=calls, most=calls_before):
            calls.append(0)
            if len(calls) > most:
                raise OSError

        handle = models[0].model.language_model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(OSError):
            generate(*models, prompt, **options)
        handle.remove()


def not_a_number(models, prompt, **options):
    def processor(ids, scores):
        return scores * (torch.nan if ids.shape[1] > prompt["input_ids"].shape[1] + 2 else 1)

    with pytest.raises(NonFiniteLogits):
        generate(*models, prompt, logits_processor=[processor], **options)


def refused(models, prompt, **options):
    with pytest.raises(ValueError, match="pixel_values"):
        generate(*models, {"input_ids": prompt["input_ids"]}, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        generate(*models, prompt, **options)


def closed(models, prompt, **options):
    results = generate_many(*models, [prompt] * 3, batch_size=2, **options)
    next(results)
    results.close()


def forgotten(models, prompt, **options):
    results = generate_many(*models, [prompt] * 3, batch_size=2, **options)
    next(results)
    del results
    gc.collect()


def held_up(models, prompt, **options):
    """Between two results, for as long as nobody asks for the next."""
    held_up.results = generate_many(*models, [prompt] * 3, batch_size=1, **options)
    next(held_up.results)


WAYS_OUT = [
    *(to_the_end, interrupted, failed, failed_in_a_processor, failed_in_a_forward, not_a_number),
    *(refused, closed, forgotten, held_up),
]


@pytest.mark.filterwarnings("ignore:lvspec. passes of the:RuntimeWarning")
@pytest.mark.parametrize(
    "way_out, capture",
    [
        *((way, False) for way in WAYS_OUT),
        *((way, True) for way in (interrupted, failed_in_a_forward, closed)),
        *(
            pytest.param(way, True, marks=pytest.mark.slow)
            for way in WAYS_OUT
            if way not in (interrupted, failed_in_a_forward, closed)
        ),
    ],
)
def test_nothing_is_left_behind(models, prompt, way_out, capture):
    models[0].model.language_model.set_attn_implementation("eager")
    before = state(*models)
    way_out(models, prompt, policy=STRICT, config=config(capture))
    after = state(*models)
    assert before[1:] == after[1:]
    for mine, theirs in zip(after[0], before[0], strict=True):
        assert mine == theirs
    vars(held_up).pop("results", None)


def test_an_attention_that_cannot_be_set(models, prompt, monkeypatch):
    text = models[0].model.language_model
    plain_set = type(text).set_attn_implementation

    def interrupted_set(self, name):
        plain_set(self, name)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(text), "set_attn_implementation", interrupted_set)
    before = state(*models)
    with pytest.raises(KeyboardInterrupt):
        generate(*models, prompt, policy=STRICT, config=config())
    assert state(*models) == before


# Threads.


def in_threads(*calls):
    """What each returns, or raises; all at once, in turns of a tenth of a millisecond."""
    results = [None] * len(calls)

    def run(index):
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=250)
        assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    finally:
        sys.setswitchinterval(interval)
    return results


@CAPTURE
def test_threads_share_models(models, make_prompt, capture):
    """Each has its own prompt; target and draft are the other's draft and target in every other."""
    prompts = [make_prompt(3 + index, ("video", 2, 6, 4), 3, seed=index) for index in range(4)]

    def call(index):
        target, draft = models if index % 2 else models[::-1]
        return generate(target, draft, prompts[index], policy=STRICT, config=config(capture))

    expected = [call(index).tokens.tolist() for index in range(4)]
    assert len({str(tokens) for tokens in expected}) == 4
    before = state(*models)[0]
    found = in_threads(*[lambda index=index: call(index % 4) for index in range(8)])
    assert [each.tokens.tolist() for each in found] == expected * 2
    assert state(*models)[0] == before


def test_a_generator_that_rests_holds_nobody_up(models, prompt):
    expected = generate(*models, prompt, policy=STRICT, config=config()).tokens
    results = generate_many(*models, [prompt] * 2, batch_size=1, policy=STRICT, config=config())
    assert next(results).tokens.equal(expected)
    call = lambda: generate(*models, prompt, policy=STRICT, config=config())
    (found,) = in_threads(call)
    assert found.tokens.equal(expected)
    assert next(results).tokens.equal(expected)


def test_threads_that_share_a_decoder(models, prompt):
    """One of them is refused, by name, or they came one after the other."""
    made = Decoder(*models, STRICT, config())
    expected = made.generate(prompt).tokens
    found = in_threads(*[lambda: made.generate(prompt)] * 3)
    refused = [each for each in found if isinstance(each, Exception)]
    for error in refused:
        assert isinstance(error, RuntimeError)
        assert "Decoder: expected one call at a time" in str(error)
    done = [each for each in found if not isinstance(each, Exception)]
    assert done and all(each.tokens.equal(expected) for each in done)
    assert made.generate(prompt).tokens.equal(expected)


def test_a_call_within_a_call(models, prompt):
    """A streamer that asks the same model something: it does not wait for itself."""
    inner = []

    class Asking(Streamer):
        def put(self, piece):
            if not inner:
                inner.append(generate(*models, prompt, policy=STRICT, config=config()))

    outer = generate(*models, prompt, policy=STRICT, config=config(), streamer=Asking(None))
    assert inner[0].tokens.equal(outer.tokens)


# torch's modes.


@CAPTURE
def test_autocast_is_refused(models, prompt, capture):
    given = {"policy": STRICT, "config": config(capture)}
    expected = generate(*models, prompt, **given).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="torch.autocast: expected it to be off for cpu"):
            generate(*models, prompt, **given)
        with torch.autocast("cpu", enabled=False):
            assert generate(*models, prompt, **given).tokens.equal(expected)


@CAPTURE
def test_a_processor_may_use_gradients_and_keep_scores(models, prompt, capture):
    kept = []

    def processor(ids, scores):
        kept.append(scores)
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            leaf.square().sum().backward()
        return scores + 0 * leaf.grad

    given = {"policy": STRICT, "config": config(capture)}
    expected = generate(*models, prompt, **given).tokens
    assert generate(*models, prompt, logits_processor=[processor], **given).tokens.equal(expected)
    kept[0].add_(1)
    weight = nn.Parameter(torch.ones(()))
    (weight * kept[1]).square().sum().backward()
    assert weight.grad > 0


@pytest.mark.filterwarnings("ignore:lvspec. passes of the:RuntimeWarning")
def test_activations_that_a_hook_keeps_are_ordinary(models, prompt):
    kept = []
    layer = models[0].model.language_model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, output: kept.append(output))
    generate(*models, prompt, policy=STRICT, config=config(True))
    probe = nn.Linear(kept[0].shape[-1], 1)
    for activation in (kept[0], kept[-1]):
        probe(activation).sum().backward()
        activation.mul_(2)
    assert not kept[-1].requires_grad


@CAPTURE
def test_a_decoder_made_and_used_in_inference_mode(models, prompt, capture):
    """What it keeps is of use outside."""
    with torch.inference_mode():
        made = Decoder(*models, STRICT, config(capture))
        first = made.generate(prompt)
        inner = {name: value.clone() for name, value in prompt.items()}
    second = made.generate(prompt)
    assert second.tokens.equal(first.tokens)
    assert made.generate(inner).tokens.equal(first.tokens), "inputs that were made there"
    assert not any(x.is_inference() for x in (first.tokens, first.relevance, made.engine.cache.k))
