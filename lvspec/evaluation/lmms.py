"""lvspec as a model of lmms-eval: `lmms-eval --model lvspec --model_args pretrained=...,draft=...`.

lmms-eval finds `manifest` by the entry point `lmms_eval.models`. Nothing else of lvspec imports
this file: lmms-eval is no requirement.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from lvspec.checkpoint import check_files, find_checkpoint
from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.engine.result import Generation
from lvspec.evaluation.lmms_settings import (
    Settings,
    Tally,
    batch_size_of,
    frames_of,
    policy_of,
    profile_of,
    refuse_unknown,
)
from lvspec.models.loading import (
    device_called,
    load_model,
    load_pair,
    load_processor,
    prepare_alike,
)
from lvspec.policy import AcceptancePolicy
from lvspec.video.processor import HFProcessor, Processor

DTYPES = ("auto", "float32", "bfloat16", "float16")
DRAFT_WORDS = ("self", "ngram", "none")
"""What `draft` may be besides a checkpoint; "none" is plain autoregression."""


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` gives lmms-eval: the model `lvspec`."""
    return ModelManifest("lvspec", chat_class_path=f"{__name__}.LVSpec")


class Prompt(NamedTuple):
    """What is asked of one video: chat markup and all, with a placeholder where the video goes."""

    text: str
    video: str
    where: str


class LVSpec(lmms):
    """A target and a draft as a chat model of lmms-eval, for tasks of one video and text.

    Args:
        pretrained: The target: the folder of a checkpoint, or its name in the hub's cache.
        draft: The draft likewise, or self, ngram (see `lvspec.generate`) or none.
        policy: A preset of `AcceptancePolicy`; None: lvspec, for n-grams strict.
        profile: A file that `lvspec calibrate` wrote for this pair; excludes `policy` and `gamma`.
        gamma: Draft tokens per verify pass, 1 to 63, or auto; None: auto.
        dtype: Of both models: auto (the checkpoint's own), float32, bfloat16 or float16.
        device: cpu, cuda or cuda:N; None: a GPU where there is one, one for each process.
        num_frames: Frames of each video, >= 2. Excludes `fps`.
        fps: Frames per second; None, without `num_frames`, is 2.
        batch_size: Captions that are decoded together, >= 1.

    Raises:
        OSError, ValueError: A checkpoint is not there, not whole or not supported, see `load_pair`;
            or a profile is none, or of another pair.
        TypeError, ValueError: Another argument; names it, what was expected and what came.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        draft: str | None = None,
        policy: str | None = None,
        profile: str | None = None,
        gamma: int | str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(unknown, type(self).__init__)
        for name, value in (("pretrained", pretrained), ("draft", draft)):
            if not isinstance(value, str):
                words = f", {', '.join(DRAFT_WORDS)}" if name == "draft" else ""
                raise ValueError(f"{name}: expected a checkpoint{words}, got {value!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self._policy = policy_of(policy)
        self._config = DecodeConfig() if gamma is None else DecodeConfig(gamma=gamma)
        calibrated = profile_of(profile, policy=policy, gamma=gamma)
        self._frames = frames_of(num_frames, fps)
        self._batch_size = batch_size_of(batch_size)
        self._device = device_called(device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self._join(device)
        self._load(pretrained, draft, dtype)
        if calibrated is not None:
            pair = self._target, self._draft
            self._policy = AcceptancePolicy.from_profile(calibrated, *pair)
            self._config = DecodeConfig(**calibrated.config)
        self._decoder: Decoder | None = None
        self._settings: Settings | None = None
        self._seconds_reading = 0.0
        self._left_out: set[str] = set()

    def _join(self, device: str | None) -> None:
        """Be one of several processes, as `accelerate launch` and `torchrun` start them."""
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if device is None:
            self._device = self.accelerator.device

    def _load(self, pretrained: str, draft: str, dtype: str) -> None:
        folder = find_checkpoint(pretrained, "pretrained")
        check_files(folder, "pretrained")
        self._draft_processor: Processor | HFProcessor | None = None
        if draft in DRAFT_WORDS:
            processor = load_processor(folder, "pretrained")
            self._processor = replace(processor, device=self._device)
            self._target = load_model(folder, "pretrained", dtype=dtype, device=self._device)
            self._draft = None if draft == "none" else draft
            return
        folders = [folder, find_checkpoint(draft, "draft")]
        pair = load_pair(*folders, dtype=dtype, device=self._device)
        self._target, self._draft, self._processor = pair.target, pair.draft, pair.processor
        if not prepare_alike(pair.processors, folders):
            self._draft_processor = pair.draft_processor

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, of which all are checked before the first.

        What the requests gave together goes to lmms-eval's throughput table: tau, the share of
        drafted tokens that was accepted, and regret in nats per token.

        Raises:
            TypeError, ValueError: A request is not of one video and text, or a setting cannot be
                met; names task, document and what came.
            OSError, ValueError: A video cannot be read; names the same.
        """
        prompts, groups = [], {}
        for index, request in enumerate(requests):
            _, to_messages, given, document, task, split = request.args
            where = f"{task}, document {document}"
            prompts.append(self._prompt(to_messages(self.task_dict[task][split][document]), where))
            self._say_left_out(given)
            settings = Settings.of(given, where)
            try:
                settings.config(self._config)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
            groups.setdefault(settings, []).append(index)
        answers: dict[int, GenerationResult] = {}
        tally = Tally()
        self._seconds_reading, start = 0.0, time.perf_counter()
        with tqdm(total=len(requests), desc="lvspec", disable=self.rank != 0) as bar:
            for settings, indices in groups.items():
                inputs = (self._inputs(prompts[index]) for index in indices)
                found = self._decoder_for(settings).generate_many(inputs)
                for index, generation in zip(indices, found):
                    answers[index] = _answer(generation, settings)
                    tally.add(generation.stats, generation.tokens.shape[1])
                    bar.set_postfix(tau=f"{tally.tau:.2f}", refresh=False)
                    bar.update()
        seconds = time.perf_counter() - start - self._seconds_reading
        log_metrics(seconds, tally.tokens, tally.tokens / seconds, tally.metrics())
        return [answers[index] for index in range(len(requests))]

    def _prompt(self, messages: Sequence[Mapping[str, Any]], where: str) -> Prompt:
        """One request's messages, refused unless they are text and one video file."""
        chat, videos = [], []
        for message in ChatMessages(messages=messages).messages:
            parts = []
            for content in message.content:
                if content.type == "text":
                    parts.append({"type": "text", "text": content.text})
                elif content.type == "video":
                    parts.append({"type": "video"})
                    videos.append(content)
                else:
                    raise ValueError(f"{where}: expected text and one video, got an {content.type}")
            chat.append({"role": message.role, "content": parts})
        if len(videos) != 1:
            names = f" ({', '.join(str(video.url) for video in videos)})" if videos else ""
            raise ValueError(f"{where}: expected one video, got {len(videos)}{names}")
        (video,) = videos
        if not isinstance(video.url, (str, os.PathLike)):
            raise ValueError(
                f"{where}: expected the path of a video file, got {type(video.url).__name__}"
            )
        if video.start_time is not None or video.end_time is not None:
            raise ValueError(
                f"{where}: expected a whole video, got {video.url} from {video.start_time} to "
                f"{video.end_time} s"
            )
        is_hf = isinstance(self._processor, HFProcessor)
        template = self._processor.hf if is_hf else self._processor.tokenizer
        text = template.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return Prompt(text, os.fspath(video.url), where)

    def _inputs(self, prompt: Prompt) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The target's inputs, and the draft's where they differ."""
        start = time.perf_counter()
        try:
            inputs = self._processor(prompt.video, prompt.text, **self._frames)
            others = None
            if self._draft_processor is not None:
                others = self._draft_processor(prompt.video, prompt.text, **self._frames)
        except (OSError, ValueError) as error:
            raise ValueError(f"{prompt.where}: {error}") from error
        self._seconds_reading += time.perf_counter() - start
        return inputs, others

    def _decoder_for(self, settings: Settings) -> Decoder:
        """The last decoder if it has these settings: caches and CUDA graphs are kept."""
        if self._decoder is None or settings != self._settings:
            self._decoder, self._settings = None, settings  # the old caches go first
            self._decoder = Decoder(
                self._target,
                self._draft,
                self._policy,
                settings.config(self._config),
                batch_size=self._batch_size,
                stop_strings=settings.until or None,
                tokenizer=self._processor.tokenizer,
            )
        return self._decoder

    def _say_left_out(self, given: Mapping[str, Any]) -> None:
        """Name, once, the generation settings of a task that mean nothing here."""
        new = Settings.unread(given) - self._left_out
        if new:
            self._left_out |= new
            logger.warning(f"lvspec: left out of generation_kwargs: {', '.join(sorted(new))}")

    def clean(self) -> None:
        """Free the models' memory, as lmms-eval asks before a judge is loaded."""
        self._decoder = self._settings = None
        super().clean()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError: lvspec is about how text is generated."""
        raise _cannot("loglikelihood", requests)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises NotImplementedError."""
        raise _cannot("generate_until_multi_round", requests)


def _answer(generation: Generation, settings: Settings) -> GenerationResult:
    total, new = generation.sequences.shape[1], generation.tokens.shape[1]
    counts = TokenCounts(input_tokens=total - new, output_tokens=new)
    return GenerationResult(settings.cut(generation.text), counts)


def _cannot(kind: str, requests: list[Instance]) -> NotImplementedError:
    tasks = ", ".join(sorted({request.task_name for request in requests}))
    return NotImplementedError(
        f"lvspec: expected tasks of output type generate_until, got {kind} in {tasks}"
    )
