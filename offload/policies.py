"""Which expert leaves a full cache: policies that give every expert a value, from the uses a running step notes down.

The resident with the least value goes. Slots are shared by all layers, so values of different layers are compared.
Knows nothing about slots, about which experts are resident, nor about which ones the running step still needs: who
evicts leaves those out. A policy never changes what is computed, only how often it must wait.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

DENSE_SHARE = 0.75  # of a layer's experts: a step that uses so many will use nearly all of the next layer's
SCORE_SHARE = 0.5  # of the newest router score in an expert's score, as HybriMoE has it
HALF_LIFE_TOKENS = 128  # after which a use counts half for least-stale
_EVEN = 0.5  # uses that every expert is credited with, as a part of the mean
_PRIOR_USES = 64.0  # by which what ages tell must be outweighed
_AGES = np.array([0, 1, 2, 2, *4 * [3], *8 * [4], *16 * [5], 6])  # class of a number of passes since the last use
_FADED_PASSES = 8
_CLASSES = int(_AGES[-1]) + 1


@dataclass(slots=True)
class Uses:
    """What a running step writes down: arrays at fixed addresses, changed in place."""

    clock: NDArray[np.int64]  # (1,) grows by one with every layer that is computed
    last_used: NDArray[np.int64]  # (layers, experts) clock of the last use, 0: never
    counts: NDArray[np.float64]  # (layers, experts) uses, a token's each; a policy may let them decay

    @classmethod
    def none(cls, layers: int, experts: int) -> "Uses":
        """Before the first step."""
        shape = (layers, experts)
        return cls(np.zeros(1, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float64))

    def note(self, layer: int, experts: NDArray[np.int64], tokens: Any = 1) -> None:
        """A layer is computed with these experts, each by one token or by its number in `tokens` (experts,)."""
        self.clock += 1
        self.last_used[layer, experts] = self.clock[0]
        self.counts[layer, experts] += tokens


class PolicyName(StrEnum):
    """Policies to choose from."""

    LRU = "lru"
    LFU = "lfu"
    SCORE = "score"
    LEAST_STALE = "least-stale"


class Policy(Protocol):
    """Tells which expert is worth least. Called in the order of the layers, from one thread."""

    def used(self, layer: int, experts: NDArray[np.int64], scores: NDArray[np.float32] | None) -> None:
        """After a layer's routing: `experts` (n,), and where they are known their router probabilities (n,)."""

    def values(self, layer: int) -> NDArray[np.float64]:
        """(layers, experts): the resident with the least value is evicted; `layer` is the one being computed.

        `Uses` must have the layer's uses already. The array may be the policy's own: read it before the next call.
        """


def make_policy(name: PolicyName, uses: Uses) -> Policy:
    """The policy of that name over the uses that a running step notes in `uses`."""
    return _POLICIES[name](uses)


class _LRU:
    """The one not used for longest goes. Hits nothing where a scan over all experts exceeds the slots."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._values = np.empty(uses.last_used.shape)

    def used(self, layer: int, experts: NDArray[np.int64], scores: NDArray[np.float32] | None) -> None:
        """Nothing to learn beyond `Uses`."""

    def values(self, layer: int) -> NDArray[np.float64]:
        """Clock of the last use."""
        np.copyto(self._values, self._uses.last_used)
        return self._values


class _LFU:
    """The one used least often since the start goes, of equals the one not used for longest."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._values = np.empty(uses.last_used.shape)

    def used(self, layer: int, experts: NDArray[np.int64], scores: NDArray[np.float32] | None) -> None:
        """Nothing to learn beyond `Uses`."""

    def values(self, layer: int) -> NDArray[np.float64]:
        """Uses, with less than one more for a late last use."""
        np.divide(self._uses.last_used, float(self._uses.clock[0]) + 1.0, out=self._values)
        self._values += self._uses.counts
        return self._values


class _Score:
    """The one with the least score goes: S <- a s + (1 - a) S for the layer's experts, s their router probability.

    HybriMoE's Minus Recent Score (arXiv:2504.05897): a = 0.5, and s = 0 for experts outside the top scores. Needs to be
    told of every layer's use; where probabilities are not known, those used share 1.
    """

    def __init__(self, uses: Uses) -> None:
        self._scores = np.zeros(uses.last_used.shape)

    def used(self, layer: int, experts: NDArray[np.int64], scores: NDArray[np.float32] | None) -> None:
        """One step of the moving average of this layer."""
        row = self._scores[layer]
        row *= 1.0 - SCORE_SHARE
        row[experts] += SCORE_SHARE * (1.0 / max(len(experts), 1) if scores is None else scores)

    def values(self, layer: int) -> NDArray[np.float64]:
        """The moving averages."""
        return self._scores


class _LeastStale:
    """The one whose next use is expected last goes.

    After SpecMD's Least-Stale (arXiv:2602.03921), which sees that layers are walked in one cycle: a layer just passed
    comes again a whole token later, so LRU keeps what is needed last. Here that distance is joined with how often an
    expert is used: with L layers, the expected number of layers until expert e of layer l is used is
        (l - layer) mod L, or L for the layer itself,  +  L (E - m) / (m popularity)
    where m of E experts were used in the layer's newest pass, and m / (E - m) are the odds of a use in one pass of an
    expert of mean popularity. A prefill that touches all (m = E) leaves the distance alone, which is Belady's rule for
    a cyclic scan; in decode, m << E, popularity decides: an expert's decayed uses over its layer's mean, times how
    much more often than popularity alone explains experts are used that were last used as many passes ago. The
    latter factors are learned as the model runs: 1 where routing has no memory.
    """

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._layers, self._experts = layers, experts = uses.last_used.shape
        # of each layer from layer 0, which itself comes a whole token later; twice, so that any layer's is a part
        self._distance = np.tile(np.array([layers, *range(1, layers)], np.float64), 2)[:, None]
        self._seen = self._faded = int(uses.clock[0])
        self._newest = np.zeros(layers, np.int64)  # clock of each layer's newest pass that was looked at
        self._share = np.ones((layers, experts))
        self._age = np.full((layers, experts), _CLASSES - 1)  # class of age when the layer is computed next
        self._rarity = np.ones((layers, experts))  # 1 / popularity
        self._happened = np.zeros(_CLASSES)  # uses by class of age, and how many popularity explains
        self._expected = np.zeros(_CLASSES)
        self._values = np.empty((layers, experts))

    def used(self, layer: int, experts: NDArray[np.int64], scores: NDArray[np.float32] | None) -> None:
        """Nothing to learn beyond `Uses`."""

    def values(self, layer: int) -> NDArray[np.float64]:
        """The expected number of layers until the next use, negative."""
        self._fade()
        clock = int(self._uses.clock[0])
        passed = clock - self._seen  # layers computed since the last time
        self._seen = clock
        last = self._uses.last_used[layer]
        newest = int(last.max())
        is_used = last == newest
        pass_size = int(np.count_nonzero(is_used))
        if newest - self._newest[layer] == self._layers and 2 * pass_size <= self._experts:
            self._learn(layer, is_used, pass_size)
        if passed:
            self._update(slice(layer + 1 - passed, layer + 1) if passed <= layer + 1 else slice(None))
        np.multiply(self._rarity, -self._layers * (self._experts - pass_size) / pass_size, out=self._values)
        self._values -= self._distance[self._layers - layer : 2 * self._layers - layer]
        return self._values

    def _learn(self, layer: int, is_used: NDArray[np.bool_], pass_size: int) -> None:
        """Compares a layer's newest pass with what popularity alone led to expect, by class of age."""
        age = self._age[layer]
        chance = np.minimum(self._share[layer] * (pass_size / self._experts), 1.0)
        self._happened += np.bincount(age[is_used], minlength=_CLASSES)
        self._expected += np.bincount(age, chance, _CLASSES)

    def _update(self, rows: slice) -> None:
        """Says anew how rarely the experts of these layers are used."""
        last, counts = self._uses.last_used[rows], self._uses.counts[rows]
        newest = last.max(axis=1, keepdims=True)
        mean = counts.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
        share = (counts / mean + _EVEN) / (1.0 + _EVEN)
        age = _AGES[np.minimum((newest - last) // self._layers, len(_AGES) - 1)]
        self._newest[rows], self._share[rows], self._age[rows] = newest[:, 0], share, age
        factor = (self._expected + _PRIOR_USES) / (self._happened + _PRIOR_USES)
        self._rarity[rows] = factor[age] / share

    def _fade(self) -> None:
        """Lets uses fade by the passes since the last time, some passes together; each is one token or more."""
        passes = (int(self._uses.clock[0]) - self._faded) // self._layers
        if passes >= _FADED_PASSES:
            fraction = 0.5 ** (passes / HALF_LIFE_TOKENS)
            self._uses.counts *= fraction
            self._happened *= fraction
            self._expected *= fraction
            self._faded += passes * self._layers


_POLICIES: dict[PolicyName, Callable[[Uses], Policy]] = {
    PolicyName.LRU: _LRU,
    PolicyName.LFU: _LFU,
    PolicyName.SCORE: _Score,
    PolicyName.LEAST_STALE: _LeastStale,
}
