"""What a cache of experts would have hit on a recorded trace: replays of policies, and Belady's optimum as the bound.

The replay does what the expert cache does: slots shared by all layers, lookups of a layer at once, misses loaded into
free slots or in place of the residents of least value, never in place of an expert that the layer itself needs. Where
a layer misses more experts than there are slots beside those it needs, the rest is loaded and not kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from offload.policies import PolicyName, Uses, make_policy
from offload.routing_trace import RoutingTrace


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What was hit. A lookup is one expert of one layer in one step, however many of its tokens use it."""

    hits: int
    lookups: int
    tokens: int  # that were counted

    @property
    def hit_rate(self) -> float:
        """Hits over lookups; 0 without lookups."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def misses_per_token(self) -> float:
        """Experts to be loaded for a token, all layers together."""
        return (self.lookups - self.hits) / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class _Pass:
    """One layer in one step."""

    layer: int
    experts: NDArray[np.int64]  # (n,) distinct
    uses: NDArray[np.int64] | int  # (n,) tokens of each
    scores: NDArray[np.float32] | None  # (n,) mean router probabilities over the step's tokens
    counts: bool  # not a part of the warm-up


def replay(
    trace: RoutingTrace, slots: int, policy: PolicyName, *, tokens_per_step: int = 1, warm_up_tokens: int = 0
) -> ReplayResult:
    """A cache of `slots` experts, empty at first, under a policy; hits are counted behind the warm-up.

    Steps hold up to `tokens_per_step` tokens of one sequence. The cache goes from one sequence to the next.
    """
    uses = Uses.none(trace.layers, trace.experts)
    rule = make_policy(policy, uses)
    resident = np.zeros((trace.layers, trace.experts), bool)
    everything = resident.reshape(-1)
    free, hits, lookups = slots, 0, 0
    for one in _passes(trace, tokens_per_step, warm_up_tokens):
        uses.note(one.layer, one.experts, one.uses)
        rule.used(one.layer, one.experts, one.scores)
        row = resident[one.layer]
        is_there = row[one.experts]
        missing = one.experts[~is_there]
        if one.counts:
            lookups += len(one.experts)
            hits += len(one.experts) - len(missing)
        if len(missing) > free:
            row[one.experts] = False  # those needed are no candidates
            candidates = np.flatnonzero(everything)
            row[one.experts] = is_there
            evicted = min(len(missing) - free, len(candidates))
            if evicted:
                values = rule.values(one.layer).reshape(-1)[candidates]
                everything[candidates[np.argpartition(values, evicted - 1)[:evicted]]] = False
                free += evicted
        loaded = missing[:free]
        row[loaded] = True
        free -= len(loaded)
    return ReplayResult(hits, lookups, max(trace.tokens - warm_up_tokens, 0))


def belady(trace: RoutingTrace, slots: int, *, tokens_per_step: int = 1, warm_up_tokens: int = 0) -> ReplayResult:
    """The most hits that any choice of residents gives: after every layer those needed again soonest are kept.

    Exact: from one use of an expert to its next is an interval in which it may be kept, at most `slots` at a time, and
    dropping the one that ends last leaves the most whole ones (L. Belady, IBM Systems Journal 5(2), 1966). Experts
    need not be kept once they are used, and intervals that end in the warm-up are not worth a slot.
    """
    passes = list(_passes(trace, tokens_per_step, warm_up_tokens))
    next_uses = _next_uses(passes, trace.layers, trace.experts)
    kept: dict[int, int] = {}  # layer * experts + expert -> the pass of its next use
    latest: list[tuple[int, int]] = []  # heap of (-next use, key): also of some that were used since
    hits = lookups = 0
    for one, following in zip(passes, next_uses, strict=True):
        if one.counts:
            lookups += len(one.experts)
        for expert, next_use in zip(one.experts.tolist(), following.tolist(), strict=True):
            key = one.layer * trace.experts + expert
            hits += kept.pop(key, None) is not None
            if next_use < len(passes) and passes[next_use].counts:
                kept[key] = next_use
                heappush(latest, (-next_use, key))
        while len(kept) > slots:
            next_use, key = heappop(latest)
            if kept.get(key) == -next_use:
                del kept[key]
    return ReplayResult(hits, lookups, max(trace.tokens - warm_up_tokens, 0))


def hit_curve(
    trace: RoutingTrace,
    policy: PolicyName,
    slot_counts: Sequence[int],
    *,
    tokens_per_step: int = 1,
    warm_up_tokens: int = 0,
) -> tuple[tuple[int, float], ...]:
    """(slots, hit rate) of the policy for each number of slots, rising."""
    settings = {"tokens_per_step": tokens_per_step, "warm_up_tokens": warm_up_tokens}
    return tuple((slots, replay(trace, slots, policy, **settings).hit_rate) for slots in sorted(set(slot_counts)))


def _passes(trace: RoutingTrace, tokens_per_step: int, warm_up_tokens: int) -> Iterator[_Pass]:
    """Every layer of every step in order."""
    if tokens_per_step < 1:
        raise ValueError(f"steps of {tokens_per_step} tokens")
    bounds = {trace.tokens, min(max(warm_up_tokens, 0), trace.tokens)}
    for first, end in pairwise([*trace.sequence.tolist(), trace.tokens]):
        bounds.update(range(first, end, tokens_per_step))
    for first, end in pairwise(sorted(bounds)):
        ids = trace.topk_ids[first:end].astype(np.int64)
        weights = None if trace.topk_weights is None else trace.topk_weights[first:end]
        for layer in range(trace.layers):
            yield _one_pass(
                layer, ids[:, layer], weights if weights is None else weights[:, layer], first >= warm_up_tokens
            )


def _one_pass(layer: int, ids: NDArray[np.int64], weights: NDArray[np.float32] | None, counts: bool) -> _Pass:
    """`ids` and `weights` (n, used) of a layer in a step of n tokens."""
    if len(ids) == 1:
        return _Pass(layer, ids[0], 1, None if weights is None else weights[0], counts)
    experts, place, uses = np.unique(ids, return_inverse=True, return_counts=True)
    scores = None
    if weights is not None:
        scores = (np.bincount(place.reshape(-1), weights.reshape(-1)) / len(ids)).astype(np.float32)
    return _Pass(layer, experts, uses, scores, counts)


def _next_uses(passes: Sequence[_Pass], layers: int, experts: int) -> list[NDArray[np.int64]]:
    """For each expert of each pass the number of the pass that uses it next; as many as there are passes: none."""
    upcoming = np.full((layers, experts), len(passes), np.int64)
    result = []
    for number in range(len(passes) - 1, -1, -1):
        one = passes[number]
        result.append(upcoming[one.layer, one.experts])
        upcoming[one.layer, one.experts] = number
    return result[::-1]
