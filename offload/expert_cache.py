"""Weights that do not all fit in RAM: what a step needs is asked for, what others will need is read ahead.

Slots of one size hold an expert each; `cpu_kernels.expert_slots` has the tables that programs read. A layer without
routed experts counts as one expert that every token uses, so that dense models stream by the same rules. A step asks
for the experts that it lacks as soon as its router has chosen and goes on with those that are there; where a step uses
nearly all experts of a layer, as a long prompt does, those of the next layers are read ahead; a step that uses few may
have some read on a guess (`foresee`), which the layer's own look-up settles. Knows nothing about what an expert
computes or how its bytes are laid out. Invariants: what is in a slot is whole or is waited for; slots for all experts
of a layer are never lacking because of reads ahead of time.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.expert_slots import ExpertSlots
from offload.cache_counts import CacheCounts
from offload.closing import Closing
from offload.errors import FlashError
from offload.expert_load import Bundles
from offload.expert_loads import ExpertLoads
from offload.flash import FlashReader, Priority
from offload.foresight import Foresight
from offload.memory import release_pages, reserved_bytes
from offload.policies import DENSE_SHARE, Policy, PolicyName, Uses, make_policy
from offload.prefetch_gate import PrefetchGate, PrefetchMode
from offload.residents import Residents

LOADS_AHEAD = 2  # at least: one is read while another one waits to be

Elsewhere = Callable[[int], NDArray[np.bool_]]
"""(layer): (experts,) those that another device computes from memory of its own."""


class ExpertCache(Closing):
    """Slots for experts that `bundles` brings through `reader`, which belongs to the cache from now on."""

    def __init__(
        self,
        slots: ExpertSlots,
        bundles: Bundles,
        reader: FlashReader,
        *,
        policy: PolicyName = PolicyName.LRU,
        prefetch: PrefetchMode = PrefetchMode.AUTO,
    ) -> None:
        self.slots = slots
        self.reader = reader
        self.gate = PrefetchGate(prefetch)
        self._memory = reserved_bytes(slots.slots * slots.slot_bytes, huge_pages=True)
        self._policy: Policy = make_policy(policy, Uses(slots.clock[:1], slots.last_used, slots.counts))
        self._wants_every_use = policy is PolicyName.SCORE
        self._residents = Residents(slots, self._policy)
        self._loads = ExpertLoads(slots, self._residents, bundles, reader, self._memory)
        self._foresight = Foresight()
        self._elsewhere: Elsewhere | None = None
        self._misses = self._read_ahead = 0

    @property
    def address(self) -> int:
        """Of the first slot."""
        return int(self._memory.ctypes.data)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots and of the memory that reads go through."""
        return self._memory.nbytes + self.reader.buffer_bytes

    @property
    def counts(self) -> CacheCounts:
        """What was looked up, missed and read."""
        guesses, loads = self._foresight, self._loads
        return CacheCounts(
            *(self.slots.lookups, self._misses, self._read_ahead, loads.bytes_read, round(loads.waiting_s, 6)),
            *(guesses.foreseen, guesses.used, guesses.wasted_bytes, self.gate.newest),
        )

    @property
    def dense_from(self) -> int:
        """`fetch` is wanted for every layer of which so many experts are used, whether they are there or not."""
        return 0 if self._wants_every_use else int(np.ceil(self.slots.experts * DENSE_SHARE))

    @property
    def usable_slots(self) -> int:
        """Slots that are used."""
        return self._residents.usable

    def fetch(self, layer: int, missing: NDArray[np.int64], used: int) -> None:
        """Gives the missing experts of a layer slots and begins to read them; see `ExpertSlots.lookup_row`."""
        with self._loads.lock:
            self._misses += len(missing)
            is_used = self.slots.last_used[layer] == self.slots.clock[0]
            if self._wants_every_use:
                self._policy.used(layer, np.flatnonzero(is_used), None)
            if self.slots.tells[layer]:
                self._loads.looked_up(layer, is_used)
                self._foresight.settle(layer, is_used)
            if len(missing):
                slots = self._slots_for(len(missing), layer)
                self._loads.begin(layer, missing.tolist(), slots, Priority.DEMAND)
            if used >= DENSE_SHARE * self.slots.experts:
                self._load_ahead(layer)

    def _slots_for(self, count: int, layer: int) -> Sequence[int]:
        """Slots for what the layer needs now; one whose last part nobody uses may still be arriving."""
        while True:
            try:
                return self._residents.take(count, layer, 0)
            except FlashError:
                if not self._loads.wait_for_one():
                    raise

    def foresee(self, layer: int, experts: NDArray[np.int64], current: int) -> None:
        """Begins to read some of the experts that the next layer may use; see `ExpertSlots.foresee_row`.

        Only a few, and only in place of experts that the policy gives less than a guess is worth, none of them of the
        current layer's that it uses nor of the next one's.
        """
        with self._loads.lock:
            residents = self._residents
            chosen = experts[: max(min(self._foresight.most, residents.spare(current, 1)), 0)]
            lacking = len(chosen) - residents.num_free
            if lacking > 0:
                values = self._policy.values(current)
                worth = self._foresight.worth(values[layer, chosen[-lacking:]], values.max())
                least = residents.least_values(lacking, current, 1)
                chosen = chosen[: residents.num_free + int(np.logical_and.accumulate(least < worth).sum())]
            if len(chosen):
                slots = residents.take(len(chosen), current, 1)
                self._foresight.begun(layer, self._loads.begin(layer, chosen.tolist(), slots, Priority.PREFETCH))

    def leave_out(self, elsewhere: Elsewhere) -> None:
        """From now on does not read ahead of time what `elsewhere` tells."""
        self._elsewhere = elsewhere

    def set_prefetch(self, mode: PrefetchMode) -> None:
        """Says anew when experts are guessed."""
        self.gate = PrefetchGate(mode)

    def run_took(self, seconds: float, tokens: int) -> None:
        """A run that decoded a token of each of so many sequences is over: decides about guesses in the next one."""
        self.gate.token_took(seconds / tokens)

    def resize(self, slots: int) -> None:
        """Keeps to the first `slots` slots from now on, at most as many as there were at first; only between steps.

        What the others held must be read again; their memory goes back to the system.
        """
        slots = min(slots, self.slots.slots)
        self.reader.drain()
        with self._loads.lock:
            self._loads.forget()
            self._foresight.forget()
            before = self._residents.resize(slots)
            release_pages(self._memory[slots * self.slots.slot_bytes : before * self.slots.slot_bytes])

    def recover(self) -> BaseException | None:
        """After a run that failed: the error of a read or of `fetch`, if that was the cause.

        What failed can be asked for again.
        """
        self.reader.drain()
        with self._loads.lock:
            self._foresight.forget()
            error = self._loads.forget()
        return error or self.slots.take_failure()

    def close(self) -> None:
        """Ends the reads; may be called twice."""
        self.reader.close()

    def _load_ahead(self, current: int) -> None:
        """Reads what the next layers need, as far as slots can be spared that are needed later than they are."""
        layers, experts = self.slots.layers, self.slots.experts
        for step in range(1, layers):
            following = (current + step) % layers
            absent = self._absent(following)
            if not len(absent):
                continue
            room = min(self._residents.spare(current, step), max(experts, LOADS_AHEAD) - self._residents.num_arriving)
            if room <= 0:
                return
            chosen = absent[:room].tolist()
            self._read_ahead += len(chosen)
            self._loads.begin(following, chosen, self._residents.take(len(chosen), current, step), Priority.AHEAD)

    def _absent(self, layer: int) -> NDArray[np.int64]:
        """Experts of a layer without a slot that may need one."""
        absent = self._residents.absent(layer)
        return absent if self._elsewhere is None else absent[~self._elsewhere(layer)[absent]]
