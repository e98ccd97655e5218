"""What every test gets: one thread, a seed, and memory that is not zero by luck."""

import copy
import importlib.util
import math
import os
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from bench_modules import modules_of_bench
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

import lvspec.engine.decoder
from lvspec import tree
from lvspec.cli import captioning
from lvspec.models.hf_names import CACHE
from lvspec.phases.draft import Draft, Drafter, DraftShape
from lvspec.shapes import pair as embedded
from lvspec.shapes.model_configs import draft_config, target_config
from lvspec.shapes.tokenizer import build_tokenizer
from lvspec.video.config import VideoProcessorConfig

POISON = 0x55  # large as an index, odd as a length, neither 0 nor -1


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _device_contexts():
    """`with torch.device(...)` looks once which functions make tensors: before they are patched."""
    with torch.device("meta"):
        assert torch.empty(1).is_meta


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def bench():
    """`bench("limits")`: a module of bench/, which finds its neighbours as a script does."""
    with modules_of_bench() as find:
        yield find


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Uninitialised tensors hold NaN or POISON: what is read before it is written shows."""

    def poisoned(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if type(tensor) is torch.Tensor and not tensor.is_meta and not tensor.is_quantized:
                with torch.no_grad():
                    tensor.fill_(torch.nan if tensor.dtype.is_floating_point else POISON)
            return tensor

        return allocated

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def _save_random(config, vocab_size, folder, seed):
    """A checkpoint of the embedded architecture with random weights and few layers."""
    config.text_config.vocab_size = vocab_size
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = ["full_attention"] * 2
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough for the choice of a token to depend on the context
            torch.nn.init.normal_(parameter, std=0.08)
    tokenizer = build_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    VideoProcessorConfig(min_pixels=84 * 84, max_pixels=84 * 84).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_pair_folders(tmp_path_factory):
    """(target, draft): folders with random checkpoints that `from_pretrained` loads.

    Their vocabularies are padded differently, as those of Qwen2.5-VL's checkpoints are.
    """
    root = tmp_path_factory.mktemp("pair")
    return (
        _save_random(target_config(), 256, root / "target", seed=0),
        _save_random(draft_config(), 224, root / "draft", seed=1),
    )


@pytest.fixture(scope="session")
def random_pair(random_pair_folders):
    """(target, draft): those checkpoints as models, without an end-of-sequence id of their own."""
    models = [Qwen2_5_VLForConditionalGeneration.from_pretrained(f) for f in random_pair_folders]
    for model in models:
        model.generation_config.eos_token_id = None
    return tuple(models)


@pytest.fixture(scope="session")
def noisy_draft(random_pair):
    """The target's weights and a little noise: it agrees with the target now and then."""
    draft = copy.deepcopy(random_pair[0])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.003)
    return draft


@pytest.fixture(scope="session")
def pair(random_pair, noisy_draft):
    """(target, noisy draft) in float64, where no rounding changes a token."""
    return tuple(copy.deepcopy(model).double() for model in (random_pair[0], noisy_draft))


@pytest.fixture(scope="session")
def make_prompt():
    """Inputs of a random prompt: `make_prompt(3, ("video", 2, 6, 4), 5)`, see `_prompt`."""
    return _prompt


def _prompt(*parts, seed=0, seconds=1.0, dtype=torch.float32):
    """Inputs as a processor returns them, with noise for pixels.

    A part is a number of words, ("image", h, w) or ("video", t, h, w), in patches; `seconds` is the
    time between two grids of a video, `dtype` that of the pixels.
    """
    rng = torch.Generator().manual_seed(seed)
    ids, found = [], {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(8, 186, (part,), generator=rng).tolist()
            continue
        name, *grid = part
        grid = [1, *grid] if name == "image" else grid
        found[name].append(grid)
        ids += [3] + [{"image": 5, "video": 6}[name]] * (math.prod(grid) // 4) + [4]
    ids = torch.tensor([ids])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 5).long() + 2 * (ids == 6).long(),
    }
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if found[name]:
            inputs[f"{name}_grid_thw"] = torch.tensor(found[name])
            patches = sum(math.prod(grid) for grid in found[name])
            inputs[pixels] = torch.randn(patches, 2 * 3 * 14 * 14, generator=rng).to(dtype)
    if found["video"]:
        inputs["second_per_grid_ts"] = torch.full((len(found["video"]),), seconds)
    return inputs


@pytest.fixture(scope="session")
def hf_greedy():
    """`hf_greedy(model, inputs, count, eos_ids)`: the new tokens of HF's own greedy decoding."""

    def greedy(model, inputs, count, eos_ids=None):
        sequences = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(eos_ids) if eos_ids else None,
            pad_token_id=0,
        )
        return sequences[0, inputs["input_ids"].shape[1] :].tolist()

    return greedy


@pytest.fixture(scope="session")
def hf_rows():
    """`hf_rows(model, inputs, tokens)`: what HF computes at the rows that predict `tokens`."""
    return _hf_rows


@pytest.fixture(scope="module")
def hf_greedy_once(hf_greedy):
    """`hf_greedy`, asked once: for models and inputs that nobody in this file changes."""
    known = {}

    def greedy(model, inputs, count, eos_ids=None):
        key = (id(model), id(inputs), count, eos_ids)
        if key not in known:
            known[key] = (hf_greedy(model, inputs, count, eos_ids), model, inputs)
        return known[key][0]

    return greedy


_READERS = weakref.WeakKeyDictionary()


def _reader(model):
    """A copy of the model for HF's hooks, with its weights; it is not looked at for changes."""
    if model not in _READERS:
        shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
        _READERS[model] = copy.deepcopy(model, shared)
    return _READERS[model]


def _hf_rows(model, inputs, tokens):
    """(logits `[n + 1, V]`, peaks `[n + 1]`): row i predicts token i, the last what follows.

    Peaks are the largest weight on a video position, averaged over layers and heads; NaN for row 0.
    """
    prompt, rest = _hf_passes(model, inputs, tokens)
    ids = inputs["input_ids"]
    video = ((ids[0] == 5) | (ids[0] == 6)).nonzero().flatten()
    peaks = torch.full((len(tokens) + 1,), torch.nan, dtype=prompt.logits.dtype)
    if len(video):
        weights = torch.stack(rest.attentions)  # [L, 1, H, n, T + n]
        peaks[1:] = weights[..., video].amax(-1).mean(dim=(0, 1, 2))
    return torch.cat([prompt.logits[0, -1:], rest.logits[0]]), peaks


@pytest.fixture(scope="session")
def hf_passes():
    """`hf_passes(model, inputs, tokens)`: HF's outputs of prompt and caption, with attentions."""
    return _hf_passes


@torch.no_grad()
def _hf_passes(model, inputs, tokens):
    """Prefill, then one forward over all tokens with eager attention, whose weights HF returns."""
    # To return attention weights HF leaves hooks in a model, and those would be of every pass.
    model = _reader(model)
    ids, text = inputs["input_ids"], model.model.language_model
    if "video_grid_thw" in inputs or "image_grid_thw" in inputs:
        positions, _ = model.model.get_rope_index(**_only_positions(inputs))
    else:
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    cache = DynamicCache()
    text.set_attn_implementation("eager")
    prompt = model(
        **{name: value for name, value in inputs.items() if name != "attention_mask"},
        position_ids=positions,
        **{CACHE: cache},
        output_attentions=True,
    )
    rest = model(
        input_ids=torch.tensor([tokens]),
        position_ids=positions[:, :, -1:] + 1 + torch.arange(len(tokens)),
        **{CACHE: cache},
        output_attentions=True,
    )
    return prompt, rest


def _only_positions(inputs):
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    return {key: inputs[key] for key in (*names, "second_per_grid_ts") if key in inputs}


class _TreeDrafter(Drafter):
    """Two children of the root, two of the first of them, and one behind the first of those.

    `guess(state)` gives the tokens of these five, int64 `[B, 5]`.
    """

    gamma = 5
    parents = (-1, 0, 0, 1, 1, 3)

    def __init__(self, guess):
        self._guess = guess

    def allocate(self, *, batch_size, capacity):
        parents = torch.tensor([self.parents] * batch_size, dtype=torch.int32)
        count = torch.full((batch_size,), 6, dtype=torch.int32)
        ancestors, depths = tree.ancestors_from_parents(parents), tree.depths(parents[0]).long()
        self._shape = DraftShape(parents, ancestors, depths, count, is_chain=False)

    def prefill(self, inputs, sequence, **prompt):
        pass

    def propose(self, state, target_kv_len):
        return Draft(torch.cat([state.last_two[:, 1:], self._guess(state)], dim=1), self._shape)


@pytest.fixture
def loaded_once(_loaded, monkeypatch):
    """The shell loads each checkpoint once in a file, and what is made of it stays."""
    load = captioning.load_models

    def loaded(*arguments, **options):
        # The embedded pair is what is asked for without a name, and may be elsewhere or missing.
        key = (embedded.TARGET, arguments, tuple(sorted(options.items())))
        if key not in _loaded:
            _loaded[key] = load(*arguments, **options)
        return _loaded[key]

    monkeypatch.setattr(captioning, "load_models", loaded)


@pytest.fixture(scope="module")
def _loaded():
    return {}


@pytest.fixture
def draft_trees(monkeypatch):
    """`draft_trees(guess)`: from now on `generate` drafts such trees, see `_TreeDrafter`."""

    def use(guess):
        drafter = _TreeDrafter(guess)
        monkeypatch.setattr(lvspec.engine.decoder, "make_drafter", lambda *arguments: drafter)

    return use


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory):
    """`fake_cuda(ways, target_folder, draft_folder, ...)` runs tests/support/fake_cuda.py."""
    library = _guard(tmp_path_factory.mktemp("guard"))

    folder = Path(__file__).parent / "support"

    def run(*arguments, script=folder / "fake_cuda.py"):
        command = [str(part) for part in (sys.executable, script, library, *arguments)]
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]  # for ways.py
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)

    return run


def _guard(folder):
    """The library that bench/ops/cuda_guard.py builds, "" where torch needs none."""
    path = Path(__file__).parents[1] / "bench" / "ops" / "cuda_guard.py"
    spec = importlib.util.spec_from_file_location("cuda_guard", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return str(module.build_guard(folder) or "")
    except RuntimeError as reason:
        pytest.skip(str(reason))
