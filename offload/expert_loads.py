"""The reads that bring experts into slots: begun, hurried, dropped, and what becomes of those that fail.

A read that fails while nobody waits for it is logged, and made again as soon as somebody does; one that a step waits
for ends the step. Knows nothing about which experts are brought or why. Everything but `landed` and `failed`, which the
reader's threads call, is called with `lock` held. Invariant: a slot is free again only when no read fills it any more,
and a part of it that landed was told before.
"""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.expert_slots import ExpertSlots
from offload.errors import StrataError
from offload.expert_load import Bundles, Load, Piece
from offload.flash import FlashReader, Priority, Read
from offload.residents import Residents

log = logging.getLogger("strata.experts")

ARRIVAL_S = 10.0  # more than a read takes that is not stuck
FAILED = 7  # the error code of a part that could not be read


class ExpertLoads:
    """Loads into slots of `memory`, by `reader`, of what `bundles` describes."""

    def __init__(
        self,
        slots: ExpertSlots,
        residents: Residents,
        bundles: Bundles,
        reader: FlashReader,
        memory: NDArray[np.uint8],
    ) -> None:
        self.lock = threading.Lock()
        self._has_arrived = threading.Condition(self.lock)
        self.bytes_read = 0
        self._slots = slots
        self._residents = residents
        self._bundles = bundles
        self._reader = reader
        size = slots.slot_bytes
        self._memory = [memory[slot * size : (slot + 1) * size] for slot in range(slots.slots)]
        self._loads: dict[int, dict[int, Load]] = {layer: {} for layer in range(slots.layers)}
        self._error: StrataError | None = None
        self._demanded = 0  # experts on their way that a step waits for
        self._waiting_since = self._waiting_s = 0.0

    @property
    def waiting_s(self) -> float:
        """Seconds in which something that a step waited for was on its way."""
        return self._waiting_s

    def begin(self, layer: int, experts: Sequence[int], slots: Sequence[int], priority: Priority) -> list[Load]:
        """Begins to read experts of a layer into slots that were taken for them."""
        loads = []
        for expert, slot in zip(experts, slots, strict=True):
            load = Load(layer, expert, slot, self._bundles.pieces(layer, expert), self._slots.parts, priority)
            self._loads[layer][expert] = load
            self._residents.arrives(layer, expert, slot)
            loads.append(load)
        if priority is Priority.DEMAND:
            self._waits_for(len(loads))
        else:
            self._slots.tells[layer] = 1
        parts = range(self._slots.parts)
        self._read(
            [(load, piece) for part in parts for load in loads for piece in load.pieces if piece.part == part], priority
        )
        return loads

    def looked_up(self, layer: int, is_used: NDArray[np.bool_]) -> None:
        """A step uses these experts (experts,) of the layer: those that nobody waited for are waited for from now on.

        Guesses that it does not use give their slots back, if something of them was still to be read.
        """
        for load in list(self._loads[layer].values()):
            if load.is_demanded:
                continue
            if is_used[load.expert]:
                self._hurry(load)
            elif load.is_guess or load.failed:
                self._drop(load)
        # what is still on its way may fail, and who uses it then must say so
        self._slots.tells[layer] = int(any(not load.is_demanded for load in self._loads[layer].values()))

    def wait_for_one(self) -> bool:
        """Waits until a load has arrived; False if there is none, or it takes too long."""
        return bool(self._residents.num_arriving) and self._error is None and self._has_arrived.wait(ARRIVAL_S)

    def forget(self) -> StrataError | None:
        """When nothing is being read any more: what failed can be asked for again. Returns why, if a step waited."""
        for loads in self._loads.values():
            for load in loads.values():
                self._residents.free(self._residents.leaves(load.layer, load.expert))
                load.reads.clear()
                for part in range(self._slots.parts):
                    self._slots.forget_failure(load.slot, part)
            loads.clear()
        self._slots.tells[:] = 0
        self._demanded = 0
        error, self._error = self._error, None
        return error

    def _read(self, pieces: Iterable[tuple[Load, Piece]], priority: Priority) -> None:
        reads = []
        for load, piece in pieces:
            landed, failed = partial(self._landed, load, piece), partial(self._failed, load, piece, priority)
            read = Read(priority, piece.extent, landed, failed)
            load.reads.append((piece, read))
            reads.append(read)
        self._reader.submit_all(reads)

    def _hurry(self, load: Load) -> None:
        load.is_demanded = True
        self._waits_for(1)
        for _, read in load.reads:
            self._reader.hurry(read)
        failed, load.failed = load.failed, []
        if failed:
            self._read([(load, piece) for piece in failed], Priority.DEMAND)

    def _drop(self, load: Load) -> None:
        """Cancels what has not begun; then, if there was something, the expert has no slot any more."""
        cancelled = [piece for piece, read in load.reads if self._reader.cancel(read)]
        if not cancelled and not load.failed:
            return
        for piece in (*cancelled, *load.failed):
            load.left[piece.part] -= 1
            load.num_bytes -= piece.extent.num_bytes
        load.is_dropped = True
        del self._loads[load.layer][load.expert]
        self._residents.leaves(load.layer, load.expert)
        self._let_go(load)

    def _let_go(self, load: Load) -> None:
        """The slot of a load that was dropped is free when no read fills it any more."""
        if not any(load.left):
            self._residents.free(load.slot)
            load.reads.clear()

    def _landed(self, load: Load, piece: Piece, data: NDArray[np.uint8]) -> None:
        """A piece was read."""
        piece.unpack(data, self._memory[load.slot])
        with self.lock:
            self.bytes_read += piece.extent.num_bytes
            load.left[piece.part] -= 1
            if load.is_dropped:
                self._let_go(load)
                return
            if load.left[piece.part]:
                return
            # with the lock held: the slot of one that has arrived may be another's as soon as it is given back
            self._slots.landed(load.slot, piece.part)
            if not any(load.left):
                del self._loads[load.layer][load.expert]
                load.reads.clear()  # which know the load: a cycle that nobody need look for
                self._residents.arrived(load.layer, load.expert)
                self._has_arrived.notify_all()
                if load.is_demanded:
                    self._waits_for(-1)

    def _failed(self, load: Load, piece: Piece, priority: Priority, error: StrataError) -> None:
        """A piece could not be read with that priority."""
        with self.lock:
            if priority is not Priority.DEMAND:
                log.warning("reading an expert ahead failed: %s", error)
                if load.is_dropped:
                    load.left[piece.part] -= 1
                    self._let_go(load)
                elif load.is_demanded:
                    self._read([(load, piece)], Priority.DEMAND)
                else:
                    load.failed.append(piece)
                return
            self._error = self._error or error
        self._slots.failed(load.slot, piece.part, FAILED)

    def _waits_for(self, more: int) -> None:
        now = time.perf_counter()
        if self._demanded:
            self._waiting_s += now - self._waiting_since
        self._waiting_since = now
        self._demanded += more
