"""Who may use a model now, and whether it is what it was when it was used last.

HF models keep state on themselves (which attention they are set to, where positions stand), and so
do the parts that stand in for theirs. So one thread at a time decodes with a text model; another
waits until this one has read its prompts, or until a sequence of its batch has ended.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from weakref import WeakKeyDictionary

from torch import nn

from lvspec.fingerprint import Fingerprint, modules_of


class Watch:
    """Of one text model with whatever head it is used with.

    Attributes:
        number: In the order of making; who takes several watches takes them in this order.
        revision: Another number whenever the model was found changed; 0: never looked at. With an
            obstacle, when that is another.
        obstacle: Why nothing may stand in for a pass of it, in words; None: something may.
    """

    _numbers = count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.revision = 0
        self.obstacle: str | None = None
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._fingerprint: Fingerprint | None = None
        self._said: set[str] = set()

    @property
    def is_held(self) -> bool:
        """Whether this thread has the model for itself."""
        return self._owner == threading.get_ident()

    @contextmanager
    def held(self, text: nn.Module, head: nn.Module, role: str) -> Iterator[None]:
        """The model is this thread's, and was looked at: for one pass or many.

        Args:
            text: The text model.
            head: What makes logits of its output.
            role: "target" or "draft", for messages.
        """
        if self.is_held:  # patches are on it: what is seen now is not the model
            yield
            return
        with self._lock:
            try:
                self._owner = threading.get_ident()
                self._look(modules_of(text, head), role)
                yield
            finally:
                self._owner = None

    def _look(self, modules: list[nn.Module], role: str) -> None:
        modules = [module for module in modules if not _follows_length(module)]
        if self._fingerprint is not None and self._fingerprint.holds(modules):
            return
        found = Fingerprint(modules)
        if found.unknown is None or found.unknown != self.obstacle:
            self.revision += 1
        self.obstacle = found.unknown
        # What is unknown may well refer to the model, which nothing here shall keep alive.
        self._fingerprint = found if self.obstacle is None else None
        if self.obstacle is not None:
            self.say(f"passes of the {role} are HF's own, slower: {self.obstacle}")

    def say(self, message: str) -> None:
        """Warn of something about the model, once."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"lvspec: {message}", RuntimeWarning, stacklevel=2)


def _follows_length(module: nn.Module) -> bool:
    """Whether this changes from pass to pass by itself, and nothing ever stands in for it."""
    kind = getattr(module, "rope_type", None)
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


_WATCHES: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()
_MAKING = threading.Lock()


def watch_of(text: nn.Module) -> Watch:
    """The one watch of a text model; it lives as long as the model does."""
    with _MAKING:
        return _WATCHES.setdefault(text, Watch())
