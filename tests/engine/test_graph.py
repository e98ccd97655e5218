"""An iteration captured and replayed, and reports that are looked at late: the same output.

A CPU has no CUDA graphs. Here a tape stands for one: operations are kept with their tensors, and
done again on them. What it replays a graph would replay, what it cannot capture a graph could not.
"""

import contextlib
import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from ways import WAYS

import lvspec.engine.engine
from lvspec import AcceptancePolicy, DecodeConfig, Decoder, ops
from lvspec.engine.graph import WARM_UP, CudaCapturer, IterationRunner, _obstacle, make_runner
from lvspec.models.model import Model

# What makes a GPU wait for a value cannot be captured.
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal"}


class Tape(TorchDispatchMode):
    """Like a graph, a replay runs no Python of what was captured.

    The operations see the tensors that they saw, at the addresses at which those are, and numbers
    as they were. Results are written where the first ones are. Capturing leaves no trace in any
    tensor that was there before.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self._made = {}  # storages of results, which are alive as long as the tape
        self._before = {}  # address of a storage that was there before: it, and what it held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"{name} cannot be captured")
        for x in _tensors((*args, *kwargs.values())):
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = (storage, storage.clone())
        result = function(*args, **kwargs)
        outputs = _tensors([result])
        for x in outputs:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._made[storage.data_ptr()] = storage
        self.calls.append((function, args, kwargs, outputs))
        return result

    def rewind(self):
        """Everything that was there before holds what it held."""
        for storage, held in self._before.values():
            storage.copy_(held)
        self._before.clear()

    def replay(self):
        for function, args, kwargs, outputs in self.calls:
            again = _tensors([function(*args, **kwargs)])
            for mine, new in zip(outputs, again, strict=True):
                if mine.data_ptr() != new.data_ptr():
                    mine.copy_(new)


class TapeCapturer:
    """In the place of `lvspec.engine.graph.CudaCapturer`."""

    def __init__(self):
        self.captures, self.replays = 0, 0

    def capture(self, run):
        with Tape() as tape:
            result = run()
        tape.rewind()
        self.captures += 1

        def replay():
            self.replays += 1
            tape.replay()

        return replay, result

    def memory(self):
        return 0


def _tensors(values):
    """All tensors among them, and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


@pytest.fixture
def decoder(random_pair, noisy_draft):
    """`decoder(way, tape=..., **options)`: iterations are replayed by a tape, if there is one."""

    pair = {0: random_pair[0]}

    def make(
        way="chain", *, tape=None, batch_size=2, stopping=None, policy=None, draft=None, **options
    ):
        default, own = WAYS[way]
        draft = draft or default
        config = {"gamma": 5, "max_new_tokens": 40, "eos_ids": (3,), "cache_capacity": 140}
        config = DecodeConfig(**{**config, "capture": False, **own, **options})
        made = Decoder(
            pair[0],
            copy.deepcopy(noisy_draft) if draft == "model" else draft,
            AcceptancePolicy.lvspec(regret_budget=3.0) if policy is None else policy,
            config,
            batch_size=batch_size,
            **(stopping or {}),
        )
        if hasattr(made.engine.drafter, "_may_look"):  # as where there is no CPU to look
            made.engine.drafter._may_look = False
        if tape is not None:
            made.engine.runner = IterationRunner(tape)
        return made

    make.pair = pair
    return make


@pytest.fixture
def prompts(make_prompt):
    """Prompts of different lengths."""
    return [make_prompt(3, ("video", 4, 6, 6), 5 + 3 * index, seed=index) for index in range(5)]


def _facts(generations):
    """All that must not depend on how iterations are run."""
    return [
        (
            generation.index,
            generation.tokens.tolist(),
            generation.kinds.tolist(),
            generation.relevance.nan_to_num(9.0).tolist(),
            generation.stats.num_accepted,
            generation.stats.num_drafted,
            generation.stats.regret,
        )
        for generation in generations
    ]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_replayed_iteration_does_what_python_does(decoder, prompts, way):
    """Five prompts through two places, one graph for all."""
    expected = list(decoder(way).generate_many(prompts))
    tape = TapeCapturer()
    made = decoder(way, tape=tape, lag=1)
    assert _facts(made.generate_many(prompts)) == _facts(expected)
    assert (tape.captures, made.engine.runner.description) == (1, "graph")
    assert tape.replays > 5
    assert expected[0].stats.loop == "eager: not on a CUDA device"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_second_graph_where_nothing_is_found(decoder, prompts, batch_size):
    """A pass over the roots alone, chosen from the last report: the same tokens."""
    policy = AcceptancePolicy.strict()
    options = {"batch_size": batch_size, "policy": policy, "eos_ids": ()}
    expected = decoder("n-grams", **options).generate(prompts)
    tape = TapeCapturer()
    made = decoder("n-grams", tape=tape, lag=1, **options)
    made.engine._finds_late = True  # as where there is no CPU to look
    rows, plain = [], made.engine.iteration.run

    def run(*arguments):
        outcome = plain(*arguments)
        rows.append(outcome.draft.tokens.shape[1])
        return outcome

    made.engine.iteration.run = run
    found = made.generate(prompts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens.equal(theirs.tokens)
        assert ours.stats.num_drafted <= theirs.stats.num_drafted
        assert ours.stats.counts["rejected"] >= 0
    assert tape.captures == 2 and tape.replays > 10 and set(rows) == {1, 6}
    assert sum(g.stats.num_accepted != [0] * g.stats.num_iterations for g in found) > 0


def test_a_graph_serves_other_policies(decoder, prompts):
    """Numbers of a policy are in tensors; only what none before needed is captured anew."""
    less = [
        AcceptancePolicy.strict(),
        AcceptancePolicy.lvspec(max_regret=0.5, anchor_regret=None),
        AcceptancePolicy(anchor_threshold=0.12, top_k=2, shift_window=1),
    ]
    more = AcceptancePolicy(anchor_threshold=0.12, top_k=9, strict_ids=(5, 6))
    plain = decoder(batch_size=1, eos_ids=(), max_new_tokens=20)
    tape = TapeCapturer()
    made = decoder(batch_size=1, tape=tape, eos_ids=(), max_new_tokens=20)
    made.generate(prompts[0])
    assert tape.captures == 1
    for policy in (*less, more, less[0]):
        found, expected = (each.generate(prompts[1], policy=policy) for each in (made, plain))
        assert _facts([found])[0][1:] == _facts([expected])[0][1:]
        assert tape.captures == 1 + (made.engine.iteration.needs.top_k == 9)


def test_a_prompt_of_the_draft_that_cannot_be_planned(decoder, prompts, monkeypatch):
    """Kernels by a plan are not those without; a graph is kept for the next prompt of its kind."""
    tape = TapeCapturer()
    made = decoder(batch_size=1, tape=tape, eos_ids=())
    drafter, plan = made.engine.drafter, ops.plan_splits(torch.ones(1, 4), torch.tensor([4]))
    assert not drafter.has_plan
    made.generate(prompts[0])
    monkeypatch.setattr(drafter.cache, "plan", plan)
    assert drafter.has_plan
    monkeypatch.undo()
    for has_plan, captures in ((True, 2), (False, 2), (True, 2)):
        monkeypatch.setattr(type(drafter), "has_plan", has_plan)
        made.generate(prompts[1])
        assert tape.captures == captures


def test_a_capture_has_a_stream_of_its_device(monkeypatch):
    """torch would take that of the first capture's device for all."""
    used = []

    class Context(contextlib.nullcontext):
        def __init__(self, graph, **options):
            used.append(options)
            super().__init__()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", Context)
    for index in (0, 1):
        capturer = CudaCapturer(torch.device("cuda", index))
        assert capturer.capture(lambda: "result")[1] == "result"
        assert used[-1]["stream"] == f"a stream of cuda:{index}"


def test_a_loose_pass_leaves_out_no_find(decoder):
    """What is accepted then depends on what was verified; so it does once a request is loose."""
    for policy, sampling, is_certain in (
        (AcceptancePolicy.strict(), {}, True),
        (AcceptancePolicy.lvspec(), {}, False),
        (AcceptancePolicy.strict(), {"temperature": 1.0}, False),
    ):
        engine = decoder("n-grams", policy=policy, **sampling).engine
        assert not engine._finds_late, "a CPU looks"
        engine.target = SimpleNamespace(device=torch.device("cuda"))
        engine._lag = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lvspec.engine.engine, "Mailbox", lambda **_: None)
            engine._meet(engine.iteration.needs)
        assert engine._finds_late is is_certain


def test_iterations_before_a_capture_are_warm_up(decoder, prompts):
    """Their time and their tokens stand apart; a second call has none of them."""
    made = decoder(batch_size=1, tape=TapeCapturer(), eos_ids=())
    first, second = (made.generate(prompts[0]).stats for _ in range(2))
    assert first.num_warm_up_tokens == WARM_UP + sum(first.num_accepted[:WARM_UP])
    assert second.num_warm_up_tokens == 0 < first.num_warm_up_tokens
    took, later = first.seconds, second.seconds
    assert min(took["warm-up"], took["capture"], took["iteration"], later["iteration"]) > 0
    for phase in ("draft", "verify", "accept", "commit"):
        assert took[phase] == later[phase] == 0
    assert later["warm-up"] == later["capture"] == 0


@pytest.mark.parametrize("lag", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_lag_changes_nothing(decoder, prompts, lag, batch_size):
    end = _a_token(decoder, prompts[1])
    expected = decoder(batch_size=batch_size, eos_ids=(end,)).generate(prompts)
    made = decoder(batch_size=batch_size, lag=lag, eos_ids=(end,))
    assert _facts(made.generate(prompts)) == _facts(expected)
    assert any(generation.tokens[0, -1] == end for generation in expected), "by themselves"


def _a_token(decoder, prompt):
    """One that a sequence has in its middle."""
    whole = decoder("autoregression", batch_size=1, eos_ids=()).generate(prompt)
    return whole.tokens[0, 13].item()


@pytest.mark.parametrize("in_vain", [0, 1])
def test_launches_in_vain(decoder, prompts, monkeypatch, in_vain):
    """One where an end of sequence is seen late, none where the last token is under way."""
    eos_ids = (_a_token(decoder, prompts[0]),) if in_vain else ()
    made = decoder("autoregression", batch_size=1, lag=1, eos_ids=eos_ids)
    launches, plain = [], made.engine.run_phases
    monkeypatch.setattr(made.engine, "run_phases", lambda: launches.append(0) or plain())
    generation = made.generate(prompts[0])
    assert (generation.tokens[0, -1] in eos_ids) == bool(eos_ids)
    assert len(launches) == generation.stats.num_iterations + in_vain


class _Streamer:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, piece):
        assert not self.ended
        assert piece.device.type == "cpu"
        self.pieces.append(piece.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("lag", [0, 2])
def test_no_token_is_shown_behind_a_stop(decoder, prompts, lag):
    """Stopped by the host, which sees it `lag` iterations late."""
    prompt = prompts[1]
    whole = decoder(batch_size=1, eos_ids=()).generate(prompt)
    stop = whole.tokens[0, 9].item()
    first = whole.tokens[0].tolist().index(stop)

    def criterion(ids, scores):
        return ids[:, -1] == stop

    tape, streamer = TapeCapturer(), _Streamer()
    made = decoder(
        batch_size=1, tape=tape, lag=lag, eos_ids=(), stopping={"stopping_criteria": [criterion]}
    )
    found = made.generate(prompt, streamer=streamer)
    wanted = whole.tokens[0, : first + 1].tolist()
    assert found.tokens[0].tolist() == wanted
    assert streamer.pieces[0] == prompt["input_ids"][0].tolist()
    assert sum(streamer.pieces[1:], []) == wanted
    assert streamer.ended
    # The place is free for the next, which has nothing of what went on behind the stop.
    following = made.generate(prompts[2])
    alone = decoder(batch_size=1, eos_ids=(), stopping={"stopping_criteria": [criterion]}).generate(
        prompts[2]
    )
    assert _facts([following]) == _facts([alone])


def test_a_trace_outlives_replays(decoder, prompts):
    expected = decoder("dynamic tree", batch_size=1, trace=True).generate(prompts[0])
    made = decoder("dynamic tree", batch_size=1, trace=True, tape=TapeCapturer(), lag=1)
    found = made.generate(prompts[0])
    assert made.engine.runner.description == "graph"
    assert found.trace.steps() == expected.trace.steps()


def test_a_decoder_keeps_its_graph(decoder, prompts):
    """And captures again where the caches have moved."""
    tape = TapeCapturer()
    made = decoder(batch_size=1, tape=tape, cache_capacity=None)
    short, long = prompts[0], prompts[4]
    assert _facts([made.generate(short)]) == _facts([decoder(batch_size=1).generate(short)])
    made.generate(short)
    assert tape.captures == 1
    assert _facts([made.generate(long)]) == _facts([decoder(batch_size=1).generate(long)])
    assert tape.captures == 2
    assert _facts([made.generate(short)]) == _facts([decoder(batch_size=1).generate(short)])
    assert tape.captures == 2


def _hook(hf):
    hf.model.language_model.layers[0].mlp.register_forward_hook(lambda *given: -given[-1])


def _scale(hf):
    hf.model.language_model.layers[0].self_attn.scaling *= 9


@torch.no_grad()
def _replace(hf):
    weight = hf.model.language_model.layers[0].mlp.down_proj.weight
    weight.data = -weight.data


@pytest.mark.filterwarnings("ignore:lvspec. passes of the:RuntimeWarning")
@pytest.mark.parametrize(
    "change, role",
    [
        (_hook, "draft"),
        (_scale, "target"),
        (_replace, "draft"),
        pytest.param(_hook, "target", marks=pytest.mark.slow),
        pytest.param(_scale, "draft", marks=pytest.mark.slow),
        pytest.param(_replace, "target", marks=pytest.mark.slow),
    ],
)
def test_a_graph_of_a_model_that_changes(decoder, prompts, random_pair, monkeypatch, change, role):
    """What it replays was right for the model as it was."""
    target = copy.deepcopy(random_pair[0])
    monkeypatch.setitem(decoder.pair, 0, target)
    tape = TapeCapturer()
    made = decoder(batch_size=1, tape=tape)
    before = _facts([made.generate(prompts[0])])
    model = made.target if role == "target" else made.draft
    change(model.hf)
    fresh = decoder(batch_size=1, draft=made.draft.hf)
    expected = _facts([fresh.generate(prompts[0])])
    assert expected != before
    assert _facts([made.generate(prompts[0])]) == expected
    if change is _hook:
        assert tape.captures == 1
        assert made.engine.runner.description == (
            f"eager: the {role} has what a graph may leave out: Qwen2MLP has hooks"
        )
        model.hf.model.language_model.layers[0].mlp._forward_hooks.clear()
        assert _facts([made.generate(prompts[0])]) == before
    assert (tape.captures, made.engine.runner.description) == (2, "graph")


def test_samples_go_on_from_call_to_call(decoder, prompts):
    """A decoder gives to one prompt after the other what it gives to all of them."""
    together = decoder("sampling", batch_size=1).generate(prompts[:1] * 2)
    made = decoder("sampling", batch_size=1)
    apart = [made.generate(prompts[0]) for _ in range(2)]
    tokens = [generation.tokens.tolist() for generation in apart]
    assert tokens == [generation.tokens.tolist() for generation in together]
    assert tokens[0] != tokens[1]
    assert [generation.index for generation in apart] == [0, 0]


class _Broken(TapeCapturer):
    def capture(self, run):
        run = super().capture(run)  # as far as it goes
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")


def test_where_capture_fails_the_loop_goes_on(decoder, prompts):
    expected = decoder(batch_size=1).generate(prompts[0])
    made = decoder(batch_size=1, tape=_Broken())
    with pytest.warns(RuntimeWarning, match="launched from Python.*operation not permitted"):
        found = made.generate(prompts[0])
    assert _facts([found]) == _facts([expected])
    assert found.stats.loop == "eager: operation not permitted when stream is capturing"
    assert made.generate(prompts[0]).stats.loop == found.stats.loop


def test_a_read_cannot_be_captured(decoder, prompts):
    """The tape can tell: a drafter that looks is caught."""
    made = decoder("anchor stop", batch_size=1, tape=TapeCapturer())
    made.engine.drafter._may_look = True
    with pytest.warns(RuntimeWarning, match="(item|_local_scalar_dense) cannot be captured"):
        made.generate(prompts[0])


def test_capture_is_told(decoder, prompts, caplog):
    with caplog.at_level(logging.INFO, logger="lvspec"):
        decoder(batch_size=1, tape=TapeCapturer()).generate(prompts[0])
    assert [record.getMessage()[:9] for record in caplog.records] == ["capturing", "captured "]


def test_an_interruption_leaves_the_decoder_whole(decoder, prompts, monkeypatch):
    made = decoder(batch_size=2, lag=1)
    plain = made.engine.run_phases
    calls = []

    def interrupted():
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain()

    monkeypatch.setattr(made.engine, "run_phases", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        made.generate(prompts[:3])
    assert all(generation.tokens.shape[1] > 0 for generation in caught.value.generations)
    assert _facts(made.generate(prompts)) == _facts(decoder(batch_size=2).generate(prompts))


def test_one_call_at_a_time(decoder, prompts):
    made = decoder(batch_size=2)
    results = made.generate_many(prompts)
    next(results)
    with pytest.raises(RuntimeError, match="Decoder: expected one call at a time"):
        made.generate(prompts[0])
    assert len(list(results)) == len(prompts) - 1
    made.generate(prompts[0])


def test_results_that_nobody_takes_are_given_up(decoder, prompts):
    made = decoder(batch_size=2)
    results = made.generate_many(prompts, ordered=False)
    next(results)
    results.close()
    assert made.engine.active == [] and not made.engine.ended
    assert _facts(made.generate(prompts)) == _facts(decoder(batch_size=2).generate(prompts))


def test_late_failures_are_those_of_the_right_sequence(decoder, prompts, random_pair, monkeypatch):
    """NaN in one sequence of two; the other goes on."""
    expected = decoder("autoregression").generate(prompts[:2])
    made = decoder("autoregression", lag=1)
    model, calls = made.target, []
    plain = model.step

    def step(*args, **kwargs):
        output = plain(*args, **kwargs)
        calls.append(0)
        if len(calls) == 4:
            output.logits[1] = torch.nan
        return output

    monkeypatch.setattr(model, "step", step)
    first, second = made.generate_many(prompts[:2], return_exceptions=True)
    assert _facts([first]) == _facts(expected[:1])
    assert "NaN at iteration 3, row 0" in str(second)
    assert second.generation.tokens.tolist()[0] == expected[1].tokens[0, :4].tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda made: None, None),
        (
            lambda made: made.text.layers[0].register_forward_hook(lambda *args: None),
            "the target has what a graph may leave out: Qwen2_5_VLDecoderLayer has hooks",
        ),
        (
            lambda made: setattr(made, "is_static", False),
            "the target chooses in Python what to compute",
        ),
        (
            lambda made: made.hf.lm_head.to("meta"),
            "the weights of the target are on several devices",
        ),
    ],
    ids=["nothing", "hooks", "experts", "devices"],
)
def test_why_there_is_no_graph(random_pair, change, reason):
    """What is known before anything is captured."""
    model = Model(copy.deepcopy(random_pair[0]), "target")
    change(model)
    assert _obstacle(model) == reason


def test_no_graph_without_a_device(random_pair):
    model = Model(random_pair[0], "target")
    loop = make_runner([model], capture=True, obstacle=None)
    assert loop.description == "eager: not on a CUDA device"
    assert not any(loop.is_due(0, 0) for _ in range(WARM_UP + 2))


def test_warm_up_is_done_by_iterations_that_count(decoder, prompts):
    tape = TapeCapturer()
    made = decoder(batch_size=1, tape=tape)
    found = made.generate(prompts[0])
    assert tape.replays == found.stats.num_iterations - WARM_UP
    short = decoder(batch_size=1, tape=TapeCapturer(), max_new_tokens=2)
    assert short.generate(prompts[0]).stats.loop == "eager: warming up"
