"""Weights that do not all fit in RAM: which of them are there, which give way, and the reads that bring the others.

Slots of one size hold an expert each; `cpu_kernels.expert_slots` has the tables that programs read. A layer without
routed experts counts as one expert that every token uses, so that dense models stream by the same rules. A step asks
for the experts that it lacks as soon as its router has chosen and goes on with those that are there; where a step uses
nearly all experts of a layer, as a long prompt does, those of the next layers are read ahead; a step that uses few may
have some read on a guess (`foresee`), which the layer's own look-up settles. Knows nothing about what an expert
computes or how its bytes are laid out. Invariants: an expert of the layer that is being computed is never evicted, nor
one that is arriving; what is in a slot is whole or is waited for; slots for all experts of a layer are never lacking
because of reads ahead of time.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.expert_slots import ExpertSlots
from offload.cache_counts import CacheCounts
from offload.closing import Closing
from offload.errors import FlashError, StrataError
from offload.flash import Extent, FlashReader, Priority, Read
from offload.foresight import Foresight
from offload.memory import release_pages, reserved_bytes
from offload.policies import DENSE_SHARE, Policy, PolicyName, Uses, make_policy
from offload.prefetch_gate import PrefetchGate, PrefetchMode

log = logging.getLogger("strata.experts")

LOADS_AHEAD = 2  # at least: one is read while another one waits to be
FAILED = 7  # the error code of a part that could not be read


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file that belong to a part of an expert; `unpack` puts them into its slot."""

    part: int
    extent: Extent
    unpack: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]  # (bytes that were read, slot)


class Bundles(Protocol):
    """Where experts come from."""

    def pieces(self, layer: int, expert: int) -> Sequence[Piece]:
        """All pieces of an expert, part after part; every part has at least one."""
        ...


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
        self._bundles = bundles
        self._memory = reserved_bytes(slots.slots * slots.slot_bytes, huge_pages=True)
        self._uses = Uses(slots.clock[:1], slots.last_used, slots.counts)
        self._policy: Policy = make_policy(policy, self._uses)
        self._wants_every_use = policy is PolicyName.SCORE
        shape = slots.layers, slots.experts
        self._slot_of = np.full(shape, -1, np.int32)
        self._arriving = np.zeros(shape, bool)
        self._free = list(range(slots.slots - 1, -1, -1))
        self._usable = slots.slots
        self._loads: dict[tuple[int, int], _Load] = {}
        self._foresight = Foresight(slots.layers, slots.slot_bytes)
        self._guesses: dict[int, list[_Load]] = {}  # by layer: what its next look-up settles
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._error: StrataError | None = None
        self._misses = self._read_ahead = self._bytes_read = 0
        self._demanded = 0  # experts on their way that a step waits for
        self._waiting_since = self._waiting_s = 0.0

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
        guesses = self._foresight
        return CacheCounts(
            *(self.slots.lookups, self._misses, self._read_ahead, self._bytes_read, round(self._waiting_s, 6)),
            *(guesses.foreseen, guesses.used, guesses.wasted_bytes),
        )

    @property
    def dense_from(self) -> int:
        """`fetch` is wanted for every layer of which so many experts are used, whether they are there or not."""
        return 0 if self._wants_every_use else int(np.ceil(self.slots.experts * DENSE_SHARE))

    def fetch(self, layer: int, missing: NDArray[np.int64], used: int) -> None:
        """Gives the missing experts of a layer slots and begins to read them; see `ExpertSlots.lookup_row`."""
        with self._lock:
            self._misses += len(missing)
            self._settle(layer)
            if self._wants_every_use:
                self._policy.used(layer, np.flatnonzero(self.slots.last_used[layer] == self.slots.clock[0]), None)
            if len(missing):
                self._load(layer, missing, self._take(len(missing), layer, 0), Priority.DEMAND)
            self._hurry(layer)
            if used >= DENSE_SHARE * self.slots.experts:
                self._load_ahead(layer)

    def foresee(self, layer: int, experts: NDArray[np.int64], current: int) -> None:
        """Begins to read some of the experts that the next layer may use; see `ExpertSlots.foresee_row`.

        Only as many as the drive has time for, and only in place of experts that the policy gives less than a guess is
        worth, none of them of the current layer's or the next one's.
        """
        with self._lock:
            chosen = experts[: max(min(self._foresight.most, self._spare(current, 1)), 0)]
            lacking = len(chosen) - len(self._free)
            if lacking > 0:
                values = self._policy.values(current)
                worth = self._foresight.worth(values[layer, chosen[-lacking:]], values.max())
                least = np.sort(values[self._evictable(current, 1)])[:lacking]
                chosen = chosen[: len(self._free) + int(np.logical_and.accumulate(least < worth).sum())]
            if len(chosen):
                loads = self._load(layer, chosen, self._take(len(chosen), current, 1), Priority.PREFETCH)
                self._guesses.setdefault(layer, []).extend(loads)
                self.slots.tells[layer] = 1
                self._foresight.foreseen += len(loads)
                self._foresight.num_bytes += sum(load.num_bytes for load in loads)

    def run_took(self, seconds: float, tokens: int) -> None:
        """A run that decoded a token of each of so many sequences is over: decides about guesses in the next one."""
        self.gate.token_took(seconds / tokens)
        self._foresight.run_took(seconds, self.reader.counts.busy_s, self.reader.counts.num_bytes)

    def resize(self, slots: int) -> None:
        """Keeps to the first `slots` slots from now on, at most as many as there were at first; only between steps.

        What the others held must be read again; their memory goes back to the system.
        """
        slots = min(slots, self.slots.slots)
        self.reader.drain()
        with self._lock:
            self._forget_guesses()
            before, self._usable = self._usable, slots
            for layer, expert in np.argwhere(self._slot_of >= slots).tolist():
                self._evict(layer, expert)
            free = {slot for slot in self._free if slot < slots} | set(range(before, slots))
            self._free = sorted(free, reverse=True)
            release_pages(self._memory[slots * self.slots.slot_bytes : before * self.slots.slot_bytes])

    @property
    def usable_slots(self) -> int:
        """Slots that are used."""
        return self._usable

    def recover(self) -> BaseException | None:
        """After a run that failed: the error of a read or of `fetch`, if that was the cause.

        What failed can be asked for again.
        """
        self.reader.drain()
        with self._lock:
            self._forget_guesses()
            for (layer, expert), load in list(self._loads.items()):
                del self._loads[layer, expert]
                self._evict(layer, expert)
                for part in range(self.slots.parts):
                    self.slots.forget_failure(load.slot, part)
            self._demanded = 0
            error, self._error = self._error, None
        return error or self.slots.take_failure()

    def close(self) -> None:
        """Ends the reads; may be called twice."""
        self.reader.close()

    def _load(self, layer: int, experts: NDArray[np.int64], slots: list[int], priority: Priority) -> "list[_Load]":
        """Begins to read experts into free slots."""
        loads = []
        for expert, slot in zip(experts.tolist(), slots, strict=True):
            pieces = self._bundles.pieces(layer, expert)
            load = _Load(layer, expert, slot, pieces, self.slots.parts, priority)
            self._loads[layer, expert] = load
            self._slot_of[layer, expert] = slot
            self._arriving[layer, expert] = True
            self.slots.assign(layer, expert, slot)
            loads.append((load, pieces))
        if priority is Priority.DEMAND:
            self._waits_for(len(loads))
        for part in range(self.slots.parts):
            for load, pieces in loads:
                load.reads += [(piece, self._submit(load, piece, priority)) for piece in pieces if piece.part == part]
        return [load for load, _ in loads]

    def _submit(self, load: "_Load", piece: Piece, priority: Priority) -> Read:
        size = self.slots.slot_bytes
        memory = self._memory[load.slot * size : (load.slot + 1) * size]
        self._bytes_read += piece.extent.num_bytes

        def consume(data: NDArray[np.uint8]) -> None:
            piece.unpack(data, memory)
            self._arrived(load, piece.part)

        def failed(error: StrataError) -> None:
            with self._lock:
                if priority is Priority.PREFETCH:
                    self._guess_failed(load, piece, error)
                    return
                self._error = self._error or error
            self.slots.failed(load.slot, piece.part, FAILED)

        return self.reader.submit(piece.extent, consume, failed, priority)

    def _arrived(self, load: "_Load", part: int) -> None:
        """A piece of a part is in its slot."""
        with self._lock:
            load.left[part] -= 1
            if load.is_dropped:
                self._let_go(load)
                return
            if load.left[part]:
                return
            self.slots.landed(load.slot, part)
            if any(load.left):
                return
            del self._loads[load.layer, load.expert]
            self._arriving[load.layer, load.expert] = False
            if load.is_demanded:
                self._waits_for(-1)

    def _hurry(self, layer: int) -> None:
        """What of this layer was only read ahead so far is waited for now, of guesses what came true."""
        is_used = self.slots.last_used[layer] == self.slots.clock[0]
        for load in self._loads.values():
            if load.layer == layer and not load.is_demanded and (is_used[load.expert] or not load.is_guess):
                load.is_demanded = True
                self._waits_for(1)
                for _, read in load.reads:
                    self.reader.hurry(read)
                load.reads += [(piece, self._submit(load, piece, Priority.DEMAND)) for piece in load.failed]
                load.failed.clear()

    def _settle(self, layer: int) -> None:
        """Sees which guesses came true. The others give their slots back if something of them was still to be read;
        those that are being read to the end stay, and are looked at again.
        """
        is_used = self.slots.last_used[layer] == self.slots.clock[0]
        staying = []
        for load in self._guesses.pop(layer, ()):
            came_true = bool(is_used[load.expert])
            is_arriving = self._loads.get((layer, load.expert)) is load
            if is_arriving and not came_true and not self._drop(load):
                staying.append(load)
            if not load.is_settled:
                load.is_settled = True
                self._foresight.settle(load.num_bytes, is_used=came_true)
        if staying:
            self._guesses[layer] = staying
        self.slots.tells[layer] = len(staying)

    def _drop(self, load: "_Load") -> bool:
        """Cancels what has not begun of a guess; then, if there was something, it has no slot any more."""
        cancelled = [piece for piece, read in load.reads if self.reader.cancel(read)]
        if not cancelled and not load.failed:
            return False
        num_bytes = sum(piece.extent.num_bytes for piece in cancelled)
        load.num_bytes -= num_bytes
        self._bytes_read -= num_bytes
        self._foresight.num_bytes -= num_bytes
        for piece in (*cancelled, *load.failed):
            load.left[piece.part] -= 1
        load.failed.clear()
        load.is_dropped = True
        del self._loads[load.layer, load.expert]
        self._slot_of[load.layer, load.expert] = -1
        self._arriving[load.layer, load.expert] = False
        self.slots.release(load.layer, load.expert)
        self._let_go(load)
        return True

    def _let_go(self, load: "_Load") -> None:
        """The slot of a load that was dropped is free when no read fills it any more."""
        if not any(load.left):
            self._free.append(load.slot)

    def _forget_guesses(self) -> None:
        """When nothing is being read: there is nothing to settle any more."""
        for load in [load for loads in self._guesses.values() for load in loads]:
            if self._loads.get((load.layer, load.expert)) is load:
                self._drop(load)
        self._guesses.clear()
        self.slots.tells[:] = 0

    def _guess_failed(self, load: "_Load", piece: Piece, error: StrataError) -> None:
        """A piece of a guess could not be read: asked for again as soon as a step waits for it."""
        log.warning("reading an expert ahead failed: %s", error)
        if load.is_dropped:
            load.left[piece.part] -= 1
            self._let_go(load)
        elif load.is_demanded:
            load.reads.append((piece, self._submit(load, piece, Priority.DEMAND)))
        else:
            load.failed.append(piece)

    def _waits_for(self, more: int) -> None:
        now = time.perf_counter()
        if self._demanded:
            self._waiting_s += now - self._waiting_since
        self._waiting_since = now
        self._demanded += more

    def _load_ahead(self, current: int) -> None:
        """Reads what the next layers need, as far as slots can be spared that are needed later than they are."""
        layers, experts = self.slots.layers, self.slots.experts
        for step in range(1, layers):
            following = (current + step) % layers
            absent = np.flatnonzero(self._slot_of[following] < 0)
            if not len(absent):
                continue
            room = min(self._spare(current, step), max(experts, LOADS_AHEAD) - int(self._arriving.sum()))
            if room <= 0:
                return
            chosen = absent[:room]
            self._read_ahead += len(chosen)
            self._load(following, chosen, self._take(len(chosen), current, step), Priority.AHEAD)

    def _spare(self, current: int, ahead: int) -> int:
        """Slots that a layer so many ahead may have early, enough being left for all experts of any one layer."""
        return len(self._free) + int(self._evictable(current, ahead).sum()) - self.slots.experts

    def _evictable(self, current: int, ahead: int) -> NDArray[np.bool_]:
        """(layers, experts) that may give way while `current` is computed, for a layer so many `ahead` of it."""
        evictable: NDArray[np.bool_] = (self._slot_of >= 0) & ~self._arriving
        for step in range(1, ahead + 1):
            evictable[(current + step) % self.slots.layers] = False
        evictable[current] &= self.slots.last_used[current] != self.slots.clock[0]
        return evictable

    def _take(self, count: int, current: int, ahead: int) -> list[int]:
        """Free slots, those of the least valuable experts freed where there are too few."""
        lacking = count - len(self._free)
        if lacking > 0:
            evictable = np.flatnonzero(self._evictable(current, ahead).reshape(-1))
            if len(evictable) < lacking:
                more = lacking - len(evictable)
                raise FlashError(
                    f"{self.slots.slots} slots are too few for a step that needs {more} more",
                    hint="give the experts more memory, or use a smaller prefill chunk",
                )
            values = self._policy.values(current).reshape(-1)[evictable]
            order = np.argpartition(values, lacking - 1)[:lacking] if lacking < len(values) else range(len(values))
            for index in evictable[order].tolist():
                self._evict(*divmod(index, self.slots.experts))
        return [self._free.pop() for _ in range(count)]

    def _evict(self, layer: int, expert: int) -> None:
        self._free.append(int(self._slot_of[layer, expert]))
        self._slot_of[layer, expert] = -1
        self._arriving[layer, expert] = False
        self.slots.release(layer, expert)


class _Load:
    """An expert on its way: what of each part is still to come, and the reads that bring it."""

    __slots__ = (
        *("expert", "failed", "is_demanded", "is_dropped", "is_guess", "is_settled", "layer", "left", "num_bytes"),
        *("reads", "slot"),
    )

    def __init__(self, layer: int, expert: int, slot: int, pieces: Sequence[Piece], parts: int, priority: Priority):
        self.layer, self.expert, self.slot = layer, expert, slot
        self.left = [sum(piece.part == part for piece in pieces) for part in range(parts)]
        self.num_bytes = sum(piece.extent.num_bytes for piece in pieces)
        self.reads: list[tuple[Piece, Read]] = []
        self.failed: list[Piece] = []
        self.is_demanded = priority is Priority.DEMAND
        self.is_guess = priority is Priority.PREFETCH
        self.is_settled = False  # whether the guess came true was counted
        self.is_dropped = False
