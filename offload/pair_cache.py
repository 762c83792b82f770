"""RAM for those pairs of a spill file's slots that are used most, by measured use.

Uses count less the longer ago they were. What is used and not here takes the place of what is used least among some
others, looked at in turn, if it is used more itself: so a sweep over all does not drive out what comes again and again
(TinyLFU, Einziger et al., arXiv:1512.00727). Knows nothing about what pairs hold, nor who reads them. Invariant: an
entry belongs to one pair, or to none.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offload.memory import release_pages, reserved_bytes
from offload.spilled_pairs import PairedSlot

Ints = NDArray[np.int64]

AGED = np.float32(0.95)  # what a use counts for at its slot's next
LOOKED_AT = 4  # entries for each that is to be replaced
NOBODY = -1
WORTHLESS = np.float32(-1)  # less than any use


class PairCache:
    """For slots of `pairs` pairs, of at most `pair_bytes` each, in at most `most_bytes` of memory.

    MemoryError where the system has none.
    """

    def __init__(self, pairs: int, pair_bytes: int, most_bytes: int) -> None:
        self.hits = self.misses = 0
        self._pairs, self._pair_bytes = pairs, pair_bytes
        self._memory = reserved_bytes(most_bytes, huge_pages=True)
        self._pass = self._turn = 0  # passes begun, and calls of `take`
        self._slots: dict[int, PairedSlot] = {}
        self._uses = np.zeros((0, pairs), np.float32)  # by number of the slot, as of pass `seen`
        self._seen = np.zeros(0, np.int64)
        self._entries = np.zeros((0, pairs), np.int64)  # NOBODY: not here
        self._holders = np.zeros(0, np.int64)  # by entry: number of a slot * pairs + pair, or NOBODY
        self._taken = np.zeros(0, np.int64)  # the turn in which it was needed last
        self._hand = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that entries may take now."""
        return len(self._holders) * self._pair_bytes

    def begin(self, num_bytes: int) -> None:
        """A pass, for which entries may take so many bytes."""
        self._pass += 1
        entries = min(num_bytes, self._memory.nbytes) // self._pair_bytes
        more = entries - len(self._holders)
        if more < 0:
            held = self._holders[entries:]
            self._entries.reshape(-1)[held[held != NOBODY]] = NOBODY
            release_pages(self._memory[entries * self._pair_bytes :])
        self._holders = np.pad(self._holders[:entries], (0, max(more, 0)), constant_values=NOBODY)
        self._taken = np.pad(self._taken[:entries], (0, max(more, 0)))

    def take(self, slots: Sequence[PairedSlot], wanted: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Addresses of those of `wanted`, (slots, pairs), that are here, and where others are to be put: 0 for none.

        What is to be put is taken for being here from now on: see `forget`.
        """
        self._turn += 1
        numbers = np.array([self._known(slot) for slot in slots], np.int64)
        aged = AGED ** (self._pass - self._seen[numbers])[:, None]
        uses = self._uses[numbers] = self._uses[numbers] * aged + wanted
        self._seen[numbers] = self._pass
        entries = self._entries[numbers]
        here = wanted & (entries != NOBODY)
        self._taken[entries[here]] = self._turn
        missed = np.nonzero(wanted & ~here)
        room = np.full(entries.shape, NOBODY)
        room[missed] = self._replaced(numbers[missed[0]] * self._pairs + missed[1], uses[missed])
        self.hits, self.misses = self.hits + int(here.sum()), self.misses + len(missed[0])
        return self._addresses(np.where(here, entries, NOBODY)), self._addresses(room)

    def forget(self) -> None:
        """Nothing is here any more."""
        self._entries[:] = NOBODY
        self._holders[:] = NOBODY

    def _known(self, slot: PairedSlot) -> int:
        """The number of a slot, of which nothing is known any more if it is another than before."""
        number = slot.number
        if number >= len(self._seen):
            more = 2 * number + 1 - len(self._seen)
            self._uses = np.pad(self._uses, ((0, more), (0, 0)))
            self._seen = np.pad(self._seen, (0, more))
            self._entries = np.pad(self._entries, ((0, more), (0, 0)), constant_values=NOBODY)
        if self._slots.get(number) is not slot:
            self._slots[number] = slot
            entries = self._entries[number]
            self._holders[entries[entries != NOBODY]] = NOBODY
            self._entries[number], self._uses[number], self._seen[number] = NOBODY, 0, self._pass
        return number

    def _replaced(self, places: Ints, uses: NDArray[np.float32]) -> Ints:
        """An entry for each of these pairs of slots that is used so much more than what it held, or NOBODY."""
        found = np.full(len(places), NOBODY)
        size = len(self._holders)
        looked = np.arange(self._hand, self._hand + min(LOOKED_AT * len(places), size)) % max(size, 1)
        self._hand = (self._hand + len(looked)) % max(size, 1)
        looked = looked[self._taken[looked] != self._turn]
        held = self._holders[looked]
        aged = AGED ** (self._pass - self._seen[held // self._pairs])
        worth = np.where(held == NOBODY, WORTHLESS, self._uses.reshape(-1)[held] * aged)
        least, most = np.argsort(worth), np.argsort(-uses)
        count = min(len(least), len(most))
        better = uses[most[:count]] > worth[least[:count]]
        entries, chosen, left = looked[least[:count]][better], most[:count][better], held[least[:count]][better]
        flat = self._entries.reshape(-1)
        flat[left[left != NOBODY]] = NOBODY
        flat[places[chosen]] = found[chosen] = entries
        self._holders[entries], self._taken[entries] = places[chosen], self._turn
        return found

    def _addresses(self, entries: Ints) -> Ints:
        return np.where(entries == NOBODY, 0, self._memory.ctypes.data + entries * self._pair_bytes)
