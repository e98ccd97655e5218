"""The loop of `lvspec generate`: one video after the other, and nothing is lost on the way."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from lvspec.cli.checkpoints import Models, find_device, load_models, token_ids_of
from lvspec.cli.options import CALL_OPTIONS, by_option, errors_by_option
from lvspec.cli.say import say
from lvspec.cli.terminal import (
    PrintStreamer,
    caption_text,
    legend,
    naming_stdout,
    results_table,
    statistics_line,
)
from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.engine.errors import GenerationInterrupted, NonFiniteLogits
from lvspec.engine.frames import frame_attention
from lvspec.engine.result import Generation
from lvspec.environment import NotWritten, environment, write_json
from lvspec.policy import AcceptancePolicy
from lvspec.profile import Profile
from lvspec.reporting.load import CAPTIONS, CAPTIONS_VERSION
from lvspec.video.processor import sampled_times


def caption_videos(
    arguments: argparse.Namespace,
    policy: AcceptancePolicy,
    config: DecodeConfig,
    obstacles: Mapping[str, str],
) -> int:
    """Load the models and caption every video; a bad one does not lose the others.

    Args:
        arguments: Of `lvspec generate`.
        policy: What may be accepted, without the ids of `--strict-words`.
        config: How to decode.
        obstacles: Videos that are known not to work, and why.

    Returns:
        The exit code: 0, 1 if some videos failed, 2 if all were bad input, 130 after Ctrl-C.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = find_device(arguments.device)
    is_one_of_many = arguments.tensor_parallel and os.environ["RANK"] != "0"  # the first one writes
    path = None if is_one_of_many else arguments.json
    file = _ResultFile(path, {"environment": environment(device)})
    file.document.update(_describe(arguments, policy, config))
    captioner = None
    try:
        with _status("loading the models"), _plain_warnings():
            models = load_models(
                arguments.target,
                arguments.draft,
                with_draft=not arguments.no_draft,
                dtype=arguments.dtype,
                device=device,
                draft_weights=arguments.draft_weights,
                target_weights=arguments.target_weights,
                tensor_parallel=arguments.tensor_parallel,
            )
        if arguments.profile is not None:
            with errors_by_option({"profile": "--profile"}):
                Profile.read(arguments.profile).check(models.target, models.draft)
        if arguments.strict_words:
            ids = (*policy.strict_ids, *token_ids_of(arguments.strict_words, models.processor))
            policy = dataclasses.replace(policy, strict_ids=ids)
            file.document.update(_describe(arguments, policy, config))
        captioner = _Captioner(arguments, policy, config, models, file)
        captioner.begin()
        with captioner.ranks.to_the_end():
            obstacles = captioner.ranks.value(obstacles)
            for path in tqdm(arguments.video, desc="videos", disable=captioner.no_bar, leave=False):
                captioner.caption(path, obstacles.get(path))
    except KeyboardInterrupt:
        file.interrupt()
        return 130
    captioner.finish()
    return captioner.exit_code()


def _describe(
    arguments: argparse.Namespace, policy: AcceptancePolicy, config: DecodeConfig
) -> dict[str, Any]:
    """The options as they take effect, for the JSON file."""
    embedded = None if arguments.target else "embedded"
    return {
        "target": arguments.target or embedded,
        "draft": None if arguments.no_draft else arguments.draft or embedded,
        "dtype": arguments.dtype,
        "draft_weights": arguments.draft_weights,
        "target_weights": arguments.target_weights,
        "frames": {"num_frames": arguments.num_frames, "fps": arguments.fps},
        "profile": arguments.profile,
        "policy": None if arguments.no_draft else policy.to_dict(),
        "config": dataclasses.asdict(config),
    }


class _ResultFile:
    """The JSON file, written anew after every video.

    Attributes:
        is_behind: Whether the file lacks results because it could not be written.
    """

    def __init__(self, path: str | None, facts: dict[str, Any]) -> None:
        self.path = path
        self.is_behind = False
        self.results: list[dict[str, Any]] = []
        head = {"lvspec": CAPTIONS, "version": CAPTIONS_VERSION}
        self.document = {**head, **facts, "interrupted": False, "results": self.results}

    def add(self, video: str, prompt: str, generation: Generation | None, **facts: Any) -> None:
        found = {} if generation is None else generation.to_dict()
        outcome = {"error": None, "interrupted": False, **facts}
        self.results.append({"video": video, "prompt": prompt, **found, **outcome})
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        try:
            with _no_interrupt():
                write_json(self.path, self.document)
            self.is_behind = False
        except NotWritten as error:  # the next attempt has everything in it again
            if not self.is_behind:
                say(f"{error}; captions are printed all the same", kind="error")
            self.is_behind = True

    def interrupt(self) -> None:
        """Keep what there is, and say where."""
        self.document["interrupted"] = True
        self.save()
        unfinished = self.results[-1] if self.results else {"interrupted": False}
        if unfinished["interrupted"]:
            where = f"in {unfinished['video']} after {len(unfinished['tokens'])} tokens"
        elif self.results:
            where = f"after {unfinished['video']}"
        else:
            where = "before the first caption"
        if self.path is not None and not self.is_behind:
            say(f"interrupted {where}; what was generated is in {self.path}")
        elif self.is_behind:
            say(f"interrupted {where}; what was generated is not in {self.path}")
        elif self.results:
            say(f"interrupted {where}; what was generated stands above (--json FILE keeps it)")
        else:
            say(f"interrupted {where}; nothing was generated")


class _Captioner:
    """Captions one video after the other on stdout, and writes a file of results."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        policy: AcceptancePolicy,
        config: DecodeConfig,
        models: Models,
        file: _ResultFile,
    ) -> None:
        self.arguments, self.policy, self.config = arguments, policy, config
        self.models, self.file = models, file
        self.decoder = Decoder(
            models.target, models.draft, policy, config, tokenizer=models.processor.tokenizer
        )
        self.ranks = self.decoder.target.ranks
        self.console = Console()
        self.rows: list[tuple[str, Generation]] = []
        self.num_refused = 0
        several = len(arguments.video) > 1
        # A bar would stand in the middle of streamed text; None is tqdm's "only on a terminal".
        self.no_bar = None if several and not arguments.stream else True

    def begin(self) -> None:
        drafted = self.models.draft is not None
        if drafted and not self.arguments.stream and self.console.is_terminal:
            self._print(legend(anchors=self.policy.needs_relevance))

    def caption(self, path: str, obstacle: str | None) -> None:
        """Caption one video, or say why not.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was generated is printed and written.
        """
        arguments = self.arguments
        if obstacle is not None:
            self._refuse(path, obstacle)
            return
        try:
            with _plain_warnings():
                inputs, draft_inputs = self._inputs(path)
        except (OSError, ValueError) as error:
            self._refuse(path, error)
            return
        if arguments.stream:
            self._print(Text(path, "bold"))
        tokenizer = self.models.processor.tokenizer
        streamer = PrintStreamer(tokenizer) if arguments.stream else None
        generation, failure, facts, frames = None, None, {}, {}
        try:
            with _plain_warnings():
                generation = self.decoder.generate(
                    inputs, draft_inputs=draft_inputs, streamer=streamer
                )
        except (ValueError, torch.OutOfMemoryError) as error:
            self._refuse(path, error)
            return
        except NonFiniteLogits as error:
            generation, facts = error.generation, {"error": str(error)}
        except GenerationInterrupted as error:
            generation, facts, failure = error.generation, {"interrupted": True}, error
        if facts and streamer is not None:
            streamer.stop(generation.text)
        try:
            self._show(path, generation)
            if arguments.trace and not facts:
                frames = {"frames": self._frames(path, inputs, generation)}
        finally:  # what cannot be printed is kept
            self.file.add(path, arguments.prompt, generation, **facts, **frames)
        self.rows.append((path, generation))
        if "error" in facts:
            say(_about(path, facts["error"]), kind="error")
        if failure is not None:
            raise failure

    def finish(self) -> None:
        if len(self.rows) > 1:
            self._print(Text())
            self._print(results_table(self.rows), wraps=False)

    def exit_code(self) -> int:
        failed = [result for result in self.file.results if result["error"]]
        if not failed:
            return 1 if self.file.is_behind else 0
        return 2 if self.num_refused == len(self.file.results) else 1

    def _inputs(self, path: str) -> tuple[dict, dict | None]:
        """Of the target and of the draft; of several processes one reads for all."""
        if self.ranks.size == 1:
            return self._read(path, self.models.target.device)
        found = None
        if self.ranks.is_first:
            try:
                found = self._read(path, torch.device("cpu"))
            except (OSError, ValueError) as error:
                found = error
        found = self.ranks.value(found)
        if isinstance(found, Exception):
            raise found
        return tuple(None if each is None else self._moved(each) for each in found)

    def _moved(self, inputs: dict) -> dict:
        return {name: value.to(self.models.target.device) for name, value in inputs.items()}

    def _read(self, path: str, device: torch.device) -> tuple[dict, dict | None]:
        arguments, models = self.arguments, self.models
        given = {"num_frames": arguments.num_frames, "fps": arguments.fps, "device": device}
        inputs = models.processor(path, arguments.prompt, **given)
        if models.draft_processor is None:
            return inputs, None
        # Read twice, because each keeps frames at its own size; what is wrong with them was said.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return inputs, models.draft_processor(path, arguments.prompt, **given)

    def _frames(self, path: str, inputs: dict, generation: Generation) -> dict[str, Any]:
        """Where the target looked for each token, or why that is not known."""
        arguments = self.arguments
        tokens = generation.tokens[0].tolist()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong with the file was said
                times = sampled_times(path, num_frames=arguments.num_frames, fps=arguments.fps)
            target = self.models.target
            return frame_attention(target, inputs, tokens, frames=len(times)).to_dict(times)
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            say(_about(path, f"no attention by frame: {error}"), kind="warning")
            return {"missing": str(error)}

    def _refuse(self, path: str, error: object) -> None:
        message = _about(path, by_option(error, CALL_OPTIONS))
        say(message, kind="error")
        self.num_refused += 1
        self.file.add(path, self.arguments.prompt, None, error=message)

    def _show(self, path: str, generation: Generation) -> None:
        if not self.arguments.stream:
            self._print(Text(path, "bold"))
            anchors = None
            if self.models.draft is not None and self.policy.needs_relevance:
                anchors = generation.anchors[0].tolist()
            self._print(caption_text(generation, anchors))
        self._print(Text(statistics_line(generation), "dim"))

    def _print(self, text: Text, *, wraps: bool = True) -> None:
        # In a pipe a caption is one line. On a terminal the bar makes room for it.
        with tqdm.external_write_mode(file=sys.stdout), naming_stdout():
            self.console.print(text, soft_wrap=not (wraps and self.console.is_terminal))
            self.console.file.flush()


def _about(path: str, error: str) -> str:
    return error if path in error else f"{path}: {error}"


def _status(message: str) -> Any:
    console = Console(stderr=True)
    return console.status(message) if console.is_terminal else nullcontext()


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings as lines like our errors; those of libraries are for their authors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"lvspec\b")
        warnings.showwarning = lambda message, *_, **__: say(message, kind="warning")
        yield


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """An impatient second Ctrl-C must not cost the file that the first one asks for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
