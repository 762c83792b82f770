"""One sequence from its prompt to its end: which tokens to compute next, and what the logits then mean as text.

Knows nothing of how logits are computed, nor of other sequences. Invariants: exactly one `Piece` a sampled token; the
concatenated texts are the whole answer, with no half character and no part of a stop string.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offload.errors import RequestError, SequenceError
from runtime.executor.base import Step
from runtime.sampler import Sampler, SamplingParams
from runtime.session import Session
from runtime.stop_strings import StopStrings
from runtime.tokenizer import Tokenizer

log = logging.getLogger("strata.generation")

FinishReason = Literal["stop", "length", "cancelled"]

Prompt = str | Sequence[int]
"""Text, or token ids that are taken as they are."""

MOST_LOSSES = 4


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with everything that decides its answer."""

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one sampled token adds to the answer; `text` may be empty while characters or stop strings are open."""

    text: str
    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `token_ids` holds every sampled token, the end-of-generation token included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[float, ...] = ()


@dataclass(slots=True)
class Timing:
    """Wall-clock of one sequence, in seconds and tokens; `prompt_tokens` counts only what was computed."""

    started_s: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    generated_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the request to the first sampled token."""
        return None if self.first_token_s is None else self.first_token_s - self.started_s

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens computed a second until the first token was sampled."""
        return self.prompt_tokens / self.ttft_s if self.ttft_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second after the first one; None for an answer of a single token."""
        if self.first_token_s is None or self.last_token_s is None or self.generated_tokens < 2:
            return None
        return (self.generated_tokens - 1) / (self.last_token_s - self.first_token_s)


class Generation:
    """The state of one sequence; `next_step` and `advance` alternate until `finish_reason` is set."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        session: Session,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> None:
        context_tokens = session.kv.capacity_tokens
        check_prompt(prompt_ids, tokenizer.vocab_size, context_tokens)
        if max_tokens is not None and max_tokens < 1:
            raise RequestError(f"max_tokens is {max_tokens}; it must be at least 1")
        self.timing = Timing()
        self.sampler = Sampler(sampling, tokenizer.vocab_size, prompt_ids)
        self.finish_reason: FinishReason | None = None
        self.error: SequenceError | None = None  # that ended it
        self._losses = 0  # of rows, since the last token
        self.pieces: list[Piece] = []
        self._tokenizer = tokenizer
        self.session = session
        self._prompt_length = len(prompt_ids)
        self._stops = StopStrings(stop)
        self._limit_reason: FinishReason = "length"
        self._decoder = tokenizer.stream(prompt_ids=prompt_ids)
        room = context_tokens - len(prompt_ids)
        self._max_tokens = room if max_tokens is None else min(max_tokens, room)
        self.timing.cached_tokens = session.rewind_to(prompt_ids)
        self.timing.prompt_tokens = len(prompt_ids) - self.timing.cached_tokens

    @property
    def finished(self) -> bool:
        """Whether the answer has ended, or an error has ended it."""
        return self.finish_reason is not None or self.error is not None

    @property
    def tokens_left(self) -> int:
        """Tokens that the answer may still get."""
        return max(0, self._max_tokens - len(self.pieces))

    @property
    def rows(self) -> int:
        """KV rows reserved for this sequence."""
        return self.session.kv.capacity_tokens

    @property
    def prompt_tokens_left(self) -> int:
        """Prompt tokens not yet computed."""
        return max(0, self._prompt_length - self.session.kv.length)

    def next_step(self, chunk_tokens: int) -> Step:
        """The next tokens to compute: at most `chunk_tokens` of the prompt, or the token sampled last."""
        start = self.session.kv.length
        return Step(self.session.token_ids[start : start + chunk_tokens], self.session.kv)

    def advance(self, logits: NDArray[np.float32]) -> Piece | None:
        """Take the logits (vocabulary,) behind the last step's last token; None while the prompt is not through."""
        if self.session.kv.length < len(self.session.token_ids):
            return None
        sampled = self.sampler.sample(logits, len(self.session.token_ids))
        self.sampler.accept(sampled.token_id)
        self.session.token_ids.append(sampled.token_id)
        self._losses = 0
        now = time.perf_counter()
        self.timing.generated_tokens += 1
        self.timing.last_token_s = now
        if self.timing.first_token_s is None:
            self.timing.first_token_s = now
        text = self._text_of(sampled.token_id)
        piece = Piece(text, sampled.token_id, sampled.logprob, sampled.top_logprobs, self.finish_reason)
        self.pieces.append(piece)
        return piece

    def lose_rows(self, error: SequenceError) -> None:
        """Rows of its cache were lost and are computed again; `MOST_LOSSES` without a token between end the answer."""
        kv = self.session.kv
        self._losses += 1
        if error.kept_tokens >= kv.length or self._losses > MOST_LOSSES:
            self.error = error
            return
        log.warning("%s; they are computed again", error)
        kv.truncate(error.kept_tokens)

    def wind_up(self) -> bool:
        """Let the next token be the last one; an answer that has not begun ends at once, which gives True."""
        if self.pieces:
            self._max_tokens = len(self.pieces) + 1
            self._limit_reason = "cancelled"
        else:
            self.finish_reason = self.finish_reason or "cancelled"
        return self.finished

    def completion(self) -> Completion:
        """The answer so far as one value."""
        return Completion(
            text="".join(piece.text for piece in self.pieces),
            token_ids=tuple(piece.token_id for piece in self.pieces),
            finish_reason=self.finish_reason or "cancelled",
            prompt_tokens=self._prompt_length,
            logprobs=tuple(piece.logprob for piece in self.pieces),
        )

    def _text_of(self, token_id: int) -> str:
        """The text that became certain with this token; sets `finish_reason` where the answer ends."""
        if token_id in self._tokenizer.eog_ids:
            self.finish_reason = "stop"
            return self._flush("")
        text, stopped = self._stops.push(self._decoder.push(token_id))
        if stopped:
            self.finish_reason = "stop"
            return text
        if len(self.pieces) + 1 >= self._max_tokens:
            self.finish_reason = self._limit_reason
            return self._flush(text)
        return text

    def _flush(self, text: str) -> str:
        """`text` and all that was held back, cut at a stop string that only now is complete."""
        tail, stopped = self._stops.push(self._decoder.flush())
        return text + tail if stopped else text + tail + self._stops.flush()


def check_prompt(prompt_ids: Sequence[int], vocab_size: int, context_tokens: int) -> None:
    """Refuse an empty prompt, ids outside the vocabulary, and prompts that leave no room for an answer."""
    if not prompt_ids:
        raise RequestError("the prompt is empty", hint="give at least one token of text")
    if len(prompt_ids) >= context_tokens:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens; the context holds {context_tokens}, the answer's first included",
            hint="shorten the prompt or raise the context with -c",
        )
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= vocab_size:
        raise RequestError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size} tokens")
