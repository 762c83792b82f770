"""A conversation: its messages, the KV they are computed into, and what must go when it outgrows the context.

Knows nothing of the terminal. Invariant: the first system message is never dropped.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import RequestError
from runtime.engine import Engine

# For files without a template, as base models are: turns as in a written dialogue.
DIALOGUE_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
DIALOGUE_STOPS = ("\nUser:", "\nSystem:")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """What to compute for an answer: the conversation's token ids, and the messages dropped to make it fit."""

    token_ids: list[int]
    dropped: Sequence[Message]


class Conversation:
    """Messages of one chat over one session of the engine."""

    def __init__(self, engine: Engine, *, system: str | None = None) -> None:
        self._engine = engine
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._system)
        self.session = engine.session()
        self.stops: tuple[str, ...] = ()
        if engine.chat_template is None:
            engine.text.use_chat_template(DIALOGUE_TEMPLATE)
            self.stops = DIALOGUE_STOPS

    @property
    def has_own_template(self) -> bool:
        """False where the plain dialogue stands in for a template that the file lacks."""
        return not self.stops

    def ask(self, text: str, *, reserve_tokens: int) -> Turn:
        """Add the user's message; the oldest turns go where fewer than `reserve_tokens` would be left to answer.

        Raises `RequestError` where even the message alone does not fit; it is then not added.
        """
        message = {"role": "user", "content": text}
        self.messages.append(message)
        dropped: list[Message] = []
        try:
            while True:
                ids = self._engine.chat_ids(self.messages)
                if len(ids) + reserve_tokens <= self._engine.context_tokens:
                    return Turn(ids, dropped)
                oldest = len(self._system)
                if self.messages[oldest] is message:
                    if len(ids) < self._engine.context_tokens:
                        return Turn(ids, dropped)
                    raise RequestError(
                        f"the message has {len(ids)} tokens with the template; the context holds "
                        f"{self._engine.context_tokens}",
                        hint="shorten it or raise the context with -c",
                    )
                dropped.append(self.messages.pop(oldest))
                while self.messages[oldest]["role"] != "user":  # an answer goes with its question
                    dropped.append(self.messages.pop(oldest))
        except RequestError:
            self.messages = [*self._system, *dropped, *self.messages[len(self._system) : -1]]
            raise

    def answer(self, text: str) -> None:
        """Keep what the assistant said, also when it was cut short."""
        self.messages.append({"role": "assistant", "content": text.strip()})

    def resume(self, messages: Sequence[Message]) -> None:
        """Go on from an earlier conversation's messages; RequestError if they begin with another system message."""
        earlier = [message for message in messages[:1] if message["role"] == "system"]
        if self._system and messages and earlier != self._system:
            raise RequestError(
                "this conversation began with another system message, or none",
                hint="leave out --system, or begin another session",
            )
        self._system = self._system or earlier
        self.messages = list(messages) if messages else list(self._system)

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._system)
        self.session.clear()

    def save(self, path: Path) -> None:
        """Write the messages as a JSON list."""
        try:
            path.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error.strerror}", hint="name another file") from error
