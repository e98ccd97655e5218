"""Streamers get the prompt, then every token once, in order, as it is committed."""

import copy
import math
import threading

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import lvspec
from lvspec import AcceptancePolicy, DecodeConfig, Decoder, NonFiniteLogits, generate


class _Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        assert value.device.type == "cpu"
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.fixture
def broken(random_pair):
    """A target whose logits are NaN from a while on."""
    target = copy.deepcopy(random_pair[0])
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output * math.nan if len(calls) > 4 else output

    target.lm_head.register_forward_hook(hook)
    return target


@pytest.fixture
def inputs(make_prompt):
    return make_prompt(3, ("video", 4, 6, 6), 5)


@pytest.fixture
def tokenizer(random_pair_folders):
    return AutoTokenizer.from_pretrained(random_pair_folders[0])


@pytest.mark.parametrize("anchor_threshold", [-math.inf, math.inf])
@pytest.mark.parametrize("with_draft", [True, False])
def test_prompt_then_tokens(random_pair, noisy_draft, inputs, anchor_threshold, with_draft):
    recorder = _Recorder()
    generation = generate(
        random_pair[0],
        noisy_draft if with_draft else None,
        inputs,
        policy=AcceptancePolicy(anchor_threshold=anchor_threshold, top_k=5),
        config=DecodeConfig(gamma=5, max_new_tokens=24, eos_ids=(), trace=True),
        streamer=recorder,
    )
    prompt, *pieces = recorder.puts
    assert prompt == inputs["input_ids"][0].tolist()
    assert sum(pieces, []) == generation.tokens[0].tolist()
    assert all(pieces)
    if with_draft:
        steps = generation.trace.steps()
        lengths = [1] + [step.num_accepted + 1 for step in steps]
        lengths[-1] -= sum(lengths) - 24  # what max_new_tokens cuts off
        assert [len(piece) for piece in pieces] == lengths
    else:
        assert [len(piece) for piece in pieces] == [1] * 24
    assert recorder.ends == 1


def test_nothing_behind_the_end_of_sequence(random_pair, inputs):
    target, recorder = random_pair[0], _Recorder()
    config = DecodeConfig(gamma=5, max_new_tokens=24, eos_ids=())
    strict = AcceptancePolicy.strict()
    tokens = generate(target, target, inputs, policy=strict, config=config).tokens[0].tolist()
    end = next(token for token in tokens[8:11] if token not in tokens[:8])
    config = DecodeConfig(gamma=5, max_new_tokens=24, eos_ids=(end,))
    generate(target, target, inputs, policy=strict, config=config, streamer=recorder)
    assert sum(recorder.puts[1:], []) == tokens[: tokens.index(end) + 1]


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_streamer_of_transformers(random_pair, inputs, tokenizer, skip_prompt):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    generations = []

    def work():
        config = DecodeConfig(gamma=5, max_new_tokens=24, eos_ids=())
        generations.append(
            generate(*random_pair, inputs, config=config, streamer=streamer, tokenizer=tokenizer)
        )

    thread = threading.Thread(target=work)
    thread.start()
    text = "".join(streamer)
    thread.join()
    wanted = generations[0].text
    assert wanted
    assert text.endswith(wanted)
    assert (text.strip() == wanted) == skip_prompt


def test_text_needs_a_tokenizer(random_pair, inputs, tokenizer):
    config = DecodeConfig(max_new_tokens=5, eos_ids=())
    generation = generate(*random_pair, inputs, config=config, tokenizer=tokenizer)
    words = tokenizer.decode(generation.tokens[0], skip_special_tokens=True).strip()
    assert generation.text == generation.to_dict()["text"] == words
    generation = generate(*random_pair, inputs, config=config)
    assert generation.to_dict()["text"] is None
    with pytest.raises(ValueError, match=r"tokenizer: expected one in generate\(.*got None"):
        generation.text  # noqa: B018


def test_an_end_after_nan(broken, inputs, tokenizer):
    """By every way in; a consumer in another thread waits for it."""
    config = DecodeConfig(gamma=2, max_new_tokens=24, eos_ids=())
    streamer = TextIteratorStreamer(tokenizer)
    texts = []
    reader = threading.Thread(target=lambda: texts.extend(streamer), daemon=True)
    reader.start()
    with pytest.raises(NonFiniteLogits):
        generate(broken, None, inputs, config=config, streamer=streamer)
    reader.join(60)
    assert not reader.is_alive() and texts


def test_an_end_by_every_way_in(random_pair, broken, inputs):
    config = DecodeConfig(gamma=2, max_new_tokens=24, eos_ids=())
    recorders = [_Recorder() for _ in range(3)]
    with pytest.raises(NonFiniteLogits):
        generate(broken, None, [inputs] * 3, config=config, streamer=recorders)
    decoder, kept = Decoder(random_pair[0], None, config=config), _Recorder()
    with pytest.raises(ValueError, match="^target inputs: expected inputs that"):
        decoder.generate(inputs | {"pixels": 1}, streamer=kept)
    inside = _Recorder()
    with pytest.raises(ValueError, match="^lvspec_tokenizer: expected one"):
        random_pair[0].generate(
            **inputs,
            custom_generate=lvspec.custom_generate,
            lvspec_streamer=inside,
            stop_strings=["a"],
            max_new_tokens=3,
        )
    unknown = _Recorder()
    with pytest.raises(ValueError, match="^draft: expected a transformers model"):
        generate(random_pair[0], "ngrams", inputs, streamer=unknown)
    assert [recorder.ends for recorder in (*recorders, kept, inside, unknown)] == [1] * 6


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_end_after_errors_of_others(random_pair, inputs, error):
    def criterion(ids, scores):
        if ids.shape[1] > inputs["input_ids"].shape[1] + 5:
            raise error
        return torch.tensor([False])

    recorder = _Recorder()
    with pytest.raises(error):
        generate(random_pair[0], None, inputs, stopping_criteria=[criterion], streamer=recorder)
    assert recorder.ends == 1 and len(recorder.puts) == 6

    class Failing(_Recorder):
        def put(self, value):
            raise error

    recorder = Failing()
    with pytest.raises(error):
        generate(random_pair[0], None, inputs, streamer=recorder)
    assert recorder.ends == 1
