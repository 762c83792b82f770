"""What every executor offers: tokens of several sequences in, logits out.

Knows nothing about how a step is computed or what the tokens mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from offload.cache_counts import CacheCounts
from offload.errors import RequestError
from offload.prefetch_gate import PrefetchMode
from offload.routing_trace import TraceRecorder

if TYPE_CHECKING:
    from cpu_kernels.program import Program

LogitsWanted = Literal["last", "all", "none"]


class KVHandle(Protocol):
    """The cache of one sequence, wherever an executor keeps its rows: `length` of at most `capacity_tokens`."""

    @property
    def capacity_tokens(self) -> int: ...

    @property
    def length(self) -> int: ...

    def truncate(self, length: int) -> None:
        """Forgets the rows from `length` on."""
        ...


@runtime_checkable
class WindowedKV(Protocol):
    """A cache that cannot forget at every token: what it holds of older ones depends on those behind them."""

    def cut_at(self, length: int) -> int:
        """The greatest length up to `length` that `truncate` takes."""
        ...


@dataclass(slots=True)
class Step:
    """The next tokens of one sequence; `kv`, of the same executor, holds the ones before and gets these.

    `parents`: the tokens are a tree, for a `TreeExecutor` alone. Of each the place of the one it follows, -1 for what
    `kv` holds; gone through depth first, so that a token stands behind its parent or behind another's whole branch.
    `kv` gets those on the way to the last token; every token's logits are wanted.
    """

    token_ids: Sequence[int]
    kv: KVHandle
    parents: Sequence[int] | None = None

    @property
    def depths(self) -> list[int]:
        """How many of the step's tokens each follows. ValueError for parents that are no such walk."""
        if self.parents is None:
            return list(range(len(self.token_ids)))
        depths: list[int] = []
        way: list[int] = []  # to the token before
        for place, parent in enumerate(self.parents):
            while way and way[-1] != parent:
                way.pop()
            if not way and parent != -1:
                raise ValueError(f"token {place} of a tree follows {parent}, whose branch is over")
            depths.append(len(way))
            way.append(place)
        if len(depths) != len(self.token_ids):
            raise ValueError(f"{len(depths)} parents of {len(self.token_ids)} tokens")
        return depths

    @property
    def grows(self) -> int:
        """Tokens by which the cache is longer afterwards."""
        return len(self.token_ids) if self.parents is None else self.depths[-1] + 1


Cache = TypeVar("Cache", bound=KVHandle)


def checked_caches(steps: Sequence[Step], kind: type[Cache], vocab_size: int) -> list[Cache]:
    """The caches of the steps; RequestError or ValueError for steps that no executor can process."""
    caches = [step.kv for step in steps if isinstance(step.kv, kind)]
    if len({id(kv) for kv in caches}) != len(steps):
        raise ValueError("steps that share a KV cache, or bring one of another executor")
    for step, kv in zip(steps, caches, strict=True):
        if not step.token_ids:
            raise RequestError("a step without tokens", hint="give at least one token")
        outside = next((token for token in step.token_ids if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise RequestError(f"token {outside} is not in the vocabulary of {vocab_size}")
        needed = kv.length + max(step.depths, default=-1) + 1
        if needed > kv.capacity_tokens:
            raise RequestError(
                f"{needed} tokens do not fit in a context of {kv.capacity_tokens}",
                hint="shorten the prompt or raise the context with -c",
            )
    return caches


class Executor(Protocol):
    """Runs a model. A sequence's logits do not depend on what other sequences are in the same call, bit for bit."""

    def new_kv(self, capacity_tokens: int) -> KVHandle:
        """An empty cache for a sequence of up to that many tokens."""
        ...

    def forward(self, steps: Sequence[Step], *, logits: LogitsWanted = "last") -> list[NDArray[np.float32]]:
        """Processes every step and returns (n, vocab) logits for each: n is 1 ("last"), its tokens ("all"), or 0.

        RequestError for no tokens, tokens outside of the vocabulary or beyond a cache's capacity, before anything is
        changed; after any other error every cache is as it was.
        """
        ...

    def close(self) -> None:
        """Frees what it holds; may be called twice."""
        ...


@runtime_checkable
class SharingExecutor(Protocol):
    """An executor whose caches may hold the same rows until one of them writes to them."""

    def share_kv(self, kv: KVHandle, other: KVHandle, tokens: int) -> int:
        """The empty cache `kv` holds the first rows of `other` from now on: so many, at most `tokens`."""
        ...


@runtime_checkable
class ThreadedExecutor(Protocol):
    """An executor whose number of threads may change between two steps."""

    def set_threads(self, threads: int) -> None:
        """Compute with that many threads from the next step on; logits and caches are the same, bit for bit."""
        ...


@runtime_checkable
class PrefetchingExecutor(Protocol):
    """An executor that may read experts on a guess of what comes next."""

    def set_prefetch(self, mode: PrefetchMode) -> None:
        """Guess always, never, or where trials say that it pays, from the next step on; logits are the same."""
        ...


@runtime_checkable
class TreeExecutor(Protocol):
    """An executor that may take several tokens of several sequences, or a tree of them, in one pass."""

    @property
    def most_pass_tokens(self) -> int:
        """Tokens of such a pass at most; 0 where it takes none."""
        ...


@runtime_checkable
class ExpertFixingExecutor(Protocol):
    """An executor whose experts are shared by devices that round differently."""

    def fix_experts(self, tokens: int) -> None:
        """Before the first step: which device computes an expert is settled for steps of up to so many tokens.

        Their logits then depend neither on what ran before nor on how many tokens a step has.
        """
        ...


@runtime_checkable
class FeatureExecutor(Protocol):
    """An executor that can show the hidden states that its last logits came from."""

    def features(self, tokens: int) -> NDArray[np.float32]:
        """Those of the last `tokens` tokens computed, behind the output norm: (tokens, width).

        ValueError for more than the last run had.
        """
        ...

    def read_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (n, vocabulary) of up to 16 hidden states (n, width), as `features` shows them; changes nothing."""
        ...

    def compute(self, program: "Program") -> None:
        """Runs a program of the caller's on the executor's threads."""
        ...


@runtime_checkable
class GpuExecutor(Protocol):
    """An executor that shares its work with a GPU."""

    @property
    def gpu_bytes(self) -> int:
        """Bytes of the GPU's memory that are in use."""
        ...

    @property
    def gpu_expert_counts(self) -> CacheCounts | None:
        """Of the experts that the GPU's layers used, how many were there; None where it has no such layers."""
        ...


@runtime_checkable
class RoutedExecutor(Protocol):
    """An executor that can tell which experts its tokens use, and how many of them were found in RAM."""

    @property
    def cache_counts(self) -> CacheCounts | None:
        """What the cache of streamed weights has seen; None where all are in RAM."""
        ...

    def shrink_cache(self, num_bytes: int) -> int:
        """Gives back about that many bytes of streamed weights; the bytes, less where a step needs them. Not lasting:
        0 takes back what there was at first.
        """
        ...

    def record_routing(self, model_name: str) -> TraceRecorder:
        """Collects what the routers decide from now on; RequestError for a model without routed experts."""
        ...
