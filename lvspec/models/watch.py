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

from lvspec.models.fingerprint import Fingerprint, modules_of

_MOST_STATES = 4
"""Of one model that are kept: adapters are turned off and on, one and another are chosen."""


class Watch:
    """Of one text model with whatever head it is used with.

    Attributes:
        number: In the order of making; who takes several watches takes them in this order.
        revision: The number of the state in which the model was found; 0: never looked at. A state
            that it comes back to, as when an adapter is turned off and on, has its number still.
        kept: Numbers of states that it may come back to; what was made for others is of no use.
        obstacle: Why nothing may stand in for a pass of it, in words; None: something may.
    """

    _numbers = count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.revision = 0
        self.obstacle: str | None = None
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._found: tuple[nn.Module, nn.Module, str] | None = None
        self._states: list[tuple[int, Fingerprint]] = []
        self._last = 0
        self._said: set[str] = set()

    @property
    def is_held(self) -> bool:
        """Whether this thread has the model for itself."""
        return self._owner == threading.get_ident()

    @property
    def kept(self) -> set[int]:
        return {revision for revision, _ in self._states}

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
                self._found = (text, head, role)
                self.look_again()
                yield
            finally:
                self._owner = self._found = None

    def look_again(self) -> None:
        """Whoever holds the model has moved its weights."""
        text, head, role = self._found
        self._look(modules_of(text, head), role)

    def _look(self, modules: list[nn.Module], role: str) -> None:
        modules = [module for module in modules if not _follows_length(module)]
        for state in self._states:
            if state[1].holds(modules):
                self._states.remove(state)
                self._states.insert(0, state)  # the likeliest next time
                self.revision, self.obstacle = state[0], None
                return
        found = Fingerprint(modules)
        if found.unknown is None or found.unknown != self.obstacle:
            self._last += 1
            self.revision = self._last
        self.obstacle = found.unknown
        # What was made for other weights would keep those alive.
        self._states = [state for state in self._states if state[1].has_places_of(found)]
        if found.unknown is None:
            self._states = [(self.revision, found), *self._states[: _MOST_STATES - 1]]
        else:  # it may well refer to the model, which nothing here shall keep alive
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
