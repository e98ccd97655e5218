"""Streamers get the prompt, then every token once, in order, as it is committed."""

import math
import threading

import pytest
from transformers import AutoTokenizer, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from lvspec import AcceptancePolicy, DecodeConfig, generate


class _Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        assert value.device.type == "cpu"
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


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
