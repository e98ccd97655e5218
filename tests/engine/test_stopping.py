"""Stop strings and stopping criteria: asked after every token, before the token is shown."""

import time

import pytest
import torch
from policies import gated
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.stopping_criteria import ConfidenceCriteria
from transformers.generation.streamers import BaseStreamer

from lvspec import AcceptancePolicy, DecodeConfig, generate, generate_many
from lvspec.engine.stopping import Stopping

STRICT = AcceptancePolicy.strict()


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (9,), (2, ("image", 4, 8), 4)]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


@pytest.fixture(scope="module")
def pieces():
    """A byte-level tokenizer of 256 tokens, among them half characters and pieces of words."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ã", "©", "Â"]
    words = [first + second for first in "aeioustrĠ" for second in "bcdlmnr"]
    words += [f"x{first}{second}" for first in "abcde" for second in "fghijklmnopq"]
    vocabulary = dict.fromkeys(["<end>", *letters, *words])
    vocabulary.update(dict.fromkeys(f"y{number}z" for number in range(256 - len(vocabulary))))
    vocabulary = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _config(**config):
    return DecodeConfig(**{"gamma": 5, "max_new_tokens": 24, "eos_ids": (), **config})


@pytest.fixture(scope="module")
def whole(pair, prompts):
    """What every prompt gives when nothing stops it."""
    results = generate(pair[0], None, prompts, policy=STRICT, config=_config())
    return [result.tokens[0].tolist() for result in results]


def _run(pair, inputs, draft=True, policy=STRICT, config=None, **arguments):
    draft = pair[1] if draft else None
    config = _config() if config is None else config
    return generate(pair[0], draft, inputs, policy=policy, config=config, **arguments)


def _check(result, wanted):
    assert result.tokens[0].tolist() == wanted
    assert result.sequences.shape[1] - result.kinds.shape[1] >= 2
    assert result.kinds.shape == result.relevance.shape == (1, len(wanted))
    counts = result.stats.counts
    assert sum(counts[name] for name in ("exact", "loose", "shift", "bonus")) == len(wanted)


@pytest.mark.parametrize("with_draft", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 5), (4, 9), (7, 8), (20, 24)])
def test_stop_strings_across_tokens_as_in_hf(pair, prompts, whole, pieces, with_draft, start, stop):
    """From within a token to within a later one; HF ends there as well."""
    text = pieces.decode(whole[0][start:stop])
    for string in (text, text[1:], text[:-1]):
        if not string or "\ufffd" in string:
            continue
        wanted = (
            pair[0]
            .generate(
                **prompts[0],
                do_sample=False,
                max_new_tokens=24,
                eos_token_id=None,
                pad_token_id=0,
                stop_strings=[string],
                tokenizer=pieces,
            )[0, prompts[0]["input_ids"].shape[1] :]
            .tolist()
        )
        recorder = Recorder()
        result = _run(
            pair,
            prompts[0],
            with_draft,
            stop_strings=string,
            tokenizer=pieces,
            streamer=recorder,
        )
        _check(result, wanted)
        assert string in pieces.decode(result.tokens[0])
        assert string not in pieces.decode(result.tokens[0, :-1])
        assert sum(recorder.puts[1:], []) == wanted, "nothing that is not kept was shown"
        assert recorder.ends == 1


def test_stop_strings_that_begin_in_the_prompt(pair, prompts, pieces):
    """In a text prompt of words that the tokenizer knows; HF ends there as well."""
    inputs = prompts[1]
    ids = inputs["input_ids"][0]
    first = _run(pair, inputs).tokens[0]
    prompt, output = pieces.decode(ids), pieces.decode(first)
    whole = pieces.decode(torch.cat([ids, first]))
    strings = {whole[len(prompt) - more : len(prompt) + count] for more, count in [(1, 1), (3, 4)]}
    strings = {string for string in strings if "\ufffd" not in string}
    assert whole == prompt + output and strings
    for string in strings:
        found = pair[0].generate(
            **inputs,
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
            stop_strings=[string],
            tokenizer=pieces,
        )
        wanted = found[0, len(ids) :].tolist()
        assert len(wanted) <= 4
        for with_draft in (True, False):
            _check(_run(pair, inputs, with_draft, stop_strings=string, tokenizer=pieces), wanted)
    inside = prompt[2:5]
    if inside not in prompt[-2:] + output:  # it stands in the prompt alone
        result = _run(pair, inputs, stop_strings=inside, tokenizer=pieces)
        _check(result, first.tolist())


def test_a_character_of_prompt_and_output(pieces):
    ids = pieces.convert_tokens_to_ids(["a", "Ã", "©", "b"])
    stopping = Stopping(None, "aé", pieces)
    assert stopping.first_stop(torch.tensor(ids), 2, 2) == 1
    assert stopping.first_stop(torch.tensor(ids), 1, 1) is None


def test_a_character_of_two_tokens(pieces):
    """é is Ã and ©: found when the second is there."""
    ids = pieces.convert_tokens_to_ids(["a", "Ã", "©", "b"])
    stopping = Stopping(None, "é", pieces)
    for new in (4, 3, 2):
        assert stopping.first_stop(torch.tensor([9, *ids]), 4, new) == new - 1
    assert stopping.first_stop(torch.tensor([9, *ids[:2]]), 2, 2) is None


def test_stop_strings_of_the_embedded_tokenizer(pair, prompts, whole, random_pair_folders):
    """Whole words; HF's own criterion cannot take such a vocabulary apart."""
    tokenizer = AutoTokenizer.from_pretrained(random_pair_folders[0])
    known = next(i for i in range(4, 20) if max(whole[0][i : i + 2]) < 186)
    text = tokenizer.decode(whole[0][known : known + 2])
    result = _run(pair, prompts[0], stop_strings=["never said", text], tokenizer=tokenizer)
    _check(result, whole[0][: known + 2])


class After(StoppingCriteria):
    """Stops behind the given words, and keeps what it was asked."""

    def __init__(self, *words):
        self.words, self.asked = torch.tensor(words), []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        assert scores is None
        found = input_ids[0, -len(self.words) :].equal(self.words)
        return torch.tensor([found])


@pytest.mark.parametrize("policy", [STRICT, gated(0.12)])
def test_criteria_are_asked_after_every_token(pair, prompts, policy):
    free = _run(pair, prompts[0], policy=policy)
    tokens, length = free.tokens[0].tolist(), prompts[0]["input_ids"].shape[1]
    for stop in (1, 2, 6, 11, 24):
        words = tokens[:stop][-3:]
        stop = next(n for n in range(1, 25) if tokens[:n][-len(words) :] == words)
        criterion = After(*words)
        criteria = StoppingCriteriaList([MaxTimeCriteria(1e6), criterion])
        result = _run(pair, prompts[0], policy=policy, stopping_criteria=criteria)
        _check(result, tokens[:stop])
        assert criterion.asked == list(range(length + 1, length + stop + 1))
        assert result.kinds.equal(free.kinds[:, :stop])


def test_criteria_of_hf(pair, prompts, whole, pieces):
    length = prompts[0]["input_ids"].shape[1]
    result = _run(pair, prompts[0], stopping_criteria=[MaxLengthCriteria(length + 7)])
    _check(result, whole[0][:7])
    text = pieces.decode(whole[0][6:8])
    result = _run(pair, prompts[0], stopping_criteria=[StopStringCriteria(pieces, [text])])
    assert text in pieces.decode(result.tokens[0])
    started = time.time()
    result = _run(pair, prompts[0], stopping_criteria=[MaxTimeCriteria(0.0, started - 1)])
    _check(result, whole[0][:1])


def test_eos_and_length_come_first(pair, prompts, whole):
    """Whichever is earlier ends the sequence."""
    criterion = After(*whole[0][8:11])
    ends = (whole[0][5],)
    stop = whole[0].index(ends[0]) + 1
    result = _run(pair, prompts[0], stopping_criteria=[criterion], config=_config(eos_ids=ends))
    _check(result, whole[0][:stop])
    result = _run(pair, prompts[0], stopping_criteria=[criterion], config=_config(max_new_tokens=4))
    _check(result, whole[0][:4])
    ends = tuple(whole[0][12:14])
    if set(ends).isdisjoint(whole[0][:11]):
        result = _run(pair, prompts[0], stopping_criteria=[criterion], config=_config(eos_ids=ends))
        _check(result, whole[0][:11])


def test_in_a_batch_each_stops_by_itself(pair, prompts, whole):
    """Places are taken again; the others go on as if nothing had happened."""
    criteria = [After(*whole[0][2:4]), After(*whole[1][9:11])]
    recorders = [Recorder() for _ in prompts]
    found = _run(pair, prompts, stopping_criteria=criteria, streamer=recorders)
    wanted = [whole[0][:4], whole[1][:11], whole[2]]
    for result, recorder, tokens in zip(found, recorders, wanted, strict=True):
        _check(result, tokens)
        assert sum(recorder.puts[1:], []) == tokens
    order = [0, 1, 2, 0, 1, 0]
    found = generate_many(
        *pair,
        [prompts[index] for index in order],
        batch_size=2,
        policy=STRICT,
        config=_config(),
        stopping_criteria=criteria,
    )
    for index, result in zip(order, found, strict=True):
        _check(result, wanted[index])


def test_samples_stop_alike(pair, prompts):
    config = _config(temperature=0.8, seed=3)
    tokens = _run(pair, prompts[0], config=config).tokens[0].tolist()
    criterion = After(*tokens[5:8])
    _check(_run(pair, prompts[0], config=config, stopping_criteria=[criterion]), tokens[:8])


def test_wrong_arguments(pair, prompts, pieces):
    with pytest.raises(ValueError, match="^tokenizer: expected one, with which stop_strings are"):
        _run(pair, prompts[1], stop_strings="a")
    with pytest.raises(TypeError, match="^stop_strings: expected non-empty strings, got ''"):
        _run(pair, prompts[1], stop_strings=["a", ""], tokenizer=pieces)
    with pytest.raises(TypeError, match="^stopping_criteria: expected a list, got After alone"):
        _run(pair, prompts[1], stopping_criteria=After(1))
    with pytest.raises(TypeError, match="^stopping_criteria: expected callable entries, got int"):
        _run(pair, prompts[1], stopping_criteria=[3])
    with pytest.raises(ValueError, match="got ConfidenceCriteria, which needs the scores"):
        _run(pair, prompts[1], stopping_criteria=[ConfidenceCriteria(0.5)])
