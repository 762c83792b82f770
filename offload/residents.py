"""Which experts have slots, and which of them give way to others.

Knows nothing about reads. Invariants: an expert that the layer being computed uses is never evicted, nor one that is
arriving; every slot is free, an expert's, or still being filled for one that was dropped.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.expert_slots import ExpertSlots
from offload.errors import FlashError
from offload.policies import Policy


class Residents:
    """The owners of the slots that `slots` has tables for, by the values that `policy` gives them."""

    def __init__(self, slots: ExpertSlots, policy: Policy) -> None:
        self.usable = slots.slots
        self._slots = slots
        self._policy = policy
        shape = slots.layers, slots.experts
        self._slot_of = np.full(shape, -1, np.int32)
        self._arriving = np.zeros(shape, bool)
        self._free = list(range(slots.slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def num_arriving(self) -> int:
        """Experts on their way."""
        return int(self._arriving.sum())

    def absent(self, layer: int) -> NDArray[np.int64]:
        """Experts of a layer without a slot."""
        return np.flatnonzero(self._slot_of[layer] < 0)

    def arrives(self, layer: int, expert: int, slot: int) -> None:
        """Gives an expert a slot that `take` gave."""
        self._slot_of[layer, expert] = slot
        self._arriving[layer, expert] = True
        self._slots.assign(layer, expert, slot)

    def arrived(self, layer: int, expert: int) -> None:
        """All of an expert is in its slot."""
        self._arriving[layer, expert] = False

    def leaves(self, layer: int, expert: int) -> int:
        """Takes an expert its slot, which is not free yet; returns the slot."""
        slot = int(self._slot_of[layer, expert])
        self._slot_of[layer, expert] = -1
        self._arriving[layer, expert] = False
        self._slots.release(layer, expert)
        return slot

    def free(self, slot: int) -> None:
        """Nobody has this slot any more."""
        self._free.append(slot)

    def spare(self, current: int, ahead: int) -> int:
        """Slots that a layer so many ahead may have early, enough being left for all experts of any one layer."""
        return len(self._free) + int(np.count_nonzero(self._evictable(current, ahead))) - self._slots.experts

    def least_values(self, count: int, current: int, ahead: int) -> NDArray[np.float64]:
        """(at most `count`,) ascending: what those are worth that `take` would evict."""
        values = self._policy.values(current)[self._evictable(current, ahead)]
        return np.sort(values)[:count]

    def take(self, count: int, current: int, ahead: int) -> Sequence[int]:
        """Free slots, those of the least valuable experts freed where there are too few.

        `current` is the layer that is computed; the slots are for one so many `ahead` of it. FlashError if a step needs
        more than there are.
        """
        lacking = count - len(self._free)
        if lacking > 0:
            evictable = np.flatnonzero(self._evictable(current, ahead))
            if len(evictable) < lacking:
                more = lacking - len(evictable)
                raise FlashError(
                    f"{self.usable} slots are too few for a step that needs {more} more",
                    hint="give the experts more memory, or use a smaller prefill chunk",
                )
            if lacking < len(evictable):
                values = self._policy.values(current).reshape(-1)[evictable]
                evictable = evictable[np.argpartition(values, lacking - 1)[:lacking]]
            for index in evictable.tolist():
                self.free(self.leaves(*divmod(index, self._slots.experts)))
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def resize(self, slots: int) -> int:
        """Keeps to the first `slots` slots from now on, while nothing arrives; returns how many there were."""
        before, self.usable = self.usable, slots
        for layer, expert in np.argwhere(self._slot_of >= slots).tolist():
            self.leaves(layer, expert)
        free = {slot for slot in self._free if slot < slots} | set(range(before, slots))
        self._free = sorted(free, reverse=True)
        return before

    def _evictable(self, current: int, ahead: int) -> NDArray[np.bool_]:
        """(layers, experts) that may give way while `current` is computed, for a layer so many `ahead` of it."""
        evictable: NDArray[np.bool_] = (self._slot_of >= 0) & ~self._arriving
        for step in range(1, ahead + 1):
            evictable[(current + step) % self._slots.layers] = False
        evictable[current] &= self._slots.last_used[current] != self._slots.clock[0]
        return evictable
