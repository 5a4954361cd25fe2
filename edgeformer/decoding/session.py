"""A conversation: a state and the token ids that it holds; and where the sequences of a scheduler get theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeformer.decoding.session_file import read_session, write_session
from edgeformer.engines.base import Engine, State
from edgeformer.errors import EngineUnavailable

if TYPE_CHECKING:
    from edgeformer.decoding.prefix_cache import PrefixCache


class Session:
    """One conversation: a state and its token ids. The next prompt runs only the tokens that are new."""

    def __init__(self, state: State, ids: Sequence[int] = ()) -> None:
        self.state = state
        self.ids: list[int] = list(ids)
        self.user: object = None  # the sequence that runs in it

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cuts the state to its common prefix with `prompt`; returns the length of that prefix.

        The last token of the prompt always runs: it gives the logits of the first new token.
        """
        # A run that was interrupted after the engine returned leaves the state one step ahead of this list.
        known = min(self.state.length, len(self.ids))
        common = 0
        limit = min(known, len(prompt) - 1)
        while common < limit and self.ids[common] == prompt[common]:
            common += 1
        if self.state.length > common:
            if common < self.state.shortest:
                common = 0  # a sliding window has dropped keys that the next token would see
            self.state.truncate(common)
        self.ids = self.ids[:common]
        return common

    def reset(self) -> None:
        """Empties the state."""
        self.state.truncate(0)
        self.ids = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation to a file, from which `Model.session(path)` goes on, also in another process.

        Raises:
            EngineUnavailable: the engine is not the native one.
            StateError: the session is in use, or the file cannot be written; one that was there is unchanged.
        """
        state: Any = self.state
        if not hasattr(state, "to_bytes"):
            raise EngineUnavailable("Sessions are saved by engine='native' alone; load the model with it.")
        write_session(path, self.ids, state.to_bytes())

    @classmethod
    def read(cls, engine: Engine, path: str | os.PathLike[str]) -> Session:
        """The session that `save` wrote, for an engine of the same bundle and cache type.

        Raises:
            EngineUnavailable: the engine is not the native one.
            StateError: the file cannot be read, is damaged, or belongs to another model or cache type.
        """
        native: Any = engine
        if not hasattr(native, "state_from_bytes"):
            raise EngineUnavailable(
                f"Sessions are restored by engine='native' alone, this is {engine.name!r}; load the model with it."
            )
        ids, state = read_session(path)
        return cls(native.state_from_bytes(state), ids)


@dataclass(frozen=True)
class StateSource:
    """Where a sequence gets its state: a session of the caller, else the longest cached prefix, else a new one."""

    new_state: Callable[[], State]
    session: Session | None = None
    prefix_cache: PrefixCache | None = None

    def open(self, ids: Sequence[int], *, empty: bool = False) -> Session:
        """A session for a sequence that begins with `ids`; with `empty` its state holds none of them."""
        if self.session is not None:
            if empty:
                self.session.reset()
            return self.session
        if self.prefix_cache is None or empty:
            return Session(self.new_state())
        state, length = self.prefix_cache.match(ids, self.new_state)
        return Session(state, ids[:length])

    def keep(self, session: Session) -> None:
        """The tokens of `session` have run: later sequences may begin with them."""
        if self.prefix_cache is not None:
            self.prefix_cache.insert(session.ids, session.state)
