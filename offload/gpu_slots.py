"""Experts in GPU memory: which of them are there, and the uploads that bring others.

An expert that is there has a *place* in its layer's stacks (`offload.gpu_stacks`), and a table that programs read says
which. Tables change between steps alone. An expert that is lacking is computed by the CPU, or brought into one of the
places at the end of the stacks, which last for one layer of one step. Bytes come from raw rows of the model file
(`offload.raw_experts`) through a `FlashReader` and a `TransferEngine`. Knows nothing about what an expert computes.
Invariants: a place that a table names holds its expert whole; experts of `resident` layers never leave; which experts
are there never changes what is computed, only where.
"""

import ctypes
import logging
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpu_kernels.device import GpuDevice
from gpu_kernels.matrix import GpuMatrix
from offload.cache_counts import CacheCounts
from offload.closing import Closing
from offload.countdown import Countdown
from offload.errors import StrataError
from offload.flash import FlashReader, Priority
from offload.gpu_expert_load import GpuExpertLoad
from offload.gpu_stacks import ExpertStacks, make_stacks
from offload.policies import PolicyName, Uses, make_policy
from offload.raw_experts import RawExperts
from offload.transfer import TransferEngine

log = logging.getLogger("strata.experts")

FETCHES = 2  # experts on their way for later steps at a time
# By how much of a resident's value an expert must be worth more to take its place. The policy remembers about 185
# tokens: their uses of an expert that every eighth of them uses differ by a fifth by chance alone.
MARGIN = 0.3

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

Key = tuple[int, int]
"""(layer, expert)"""


class GpuSlots(Closing):
    """`slots` places for experts of the layers that `source` has; `reader` belongs to this from now on."""

    def __init__(
        self,
        source: RawExperts,
        reader: FlashReader,
        engine: TransferEngine,
        device: GpuDevice,
        *,
        layers: int,
        experts: int,
        slots: int,
        brought: int = 0,
        resident: frozenset[int] = frozenset(),
        seeds: Sequence[Key] = (),
        policy: PolicyName = PolicyName.LEAST_STALE,
    ) -> None:
        """`layers`, `experts`: of the model; `brought`: places of every stack for experts of one step.

        `load` brings all experts of `resident` layers and then of `seeds` what there are slots for. ValueError for
        fewer slots than the residents need; torch.OutOfMemoryError where the device has no room.
        """
        self._source, self._reader, self._engine, self._device = source, reader, engine, device
        self._resident = resident
        self._tables = np.full((layers, experts), -1, np.int32)
        shapes = {layer: source.matrices(layer) for layer in range(layers) if source.matrices(layer)}
        self._wanted = self._seeded(slots, [key for key in seeds if key[0] in shapes])
        wanted = Counter(layer for layer, _ in self._wanted)
        self._all_stacks = make_stacks(shapes, wanted, slots, experts=experts, brought=brought, device=device)
        self._stacks = {layer: stacks for stacks in self._all_stacks for layer in stacks.layers}
        self._uses = Uses.none(layers, experts)
        self._policy = make_policy(policy, self._uses)
        self._arriving: dict[Key, GpuExpertLoad] = {}
        self._chosen: list[tuple[Key, int]] = []  # to be fetched, and where to
        self._missed: dict[Key, None] = {}  # since the last `settle`, in order
        self._brought: list[GpuExpertLoad] = []
        self._lock = threading.Lock()
        self._lookups = self._misses = self._bytes_read = self._fetched = 0

    @property
    def num_bytes(self) -> int:
        """Of all stacks."""
        return sum(stacks.num_bytes for stacks in self._all_stacks)

    @property
    def places(self) -> int:
        """That are kept, all stacks together."""
        return sum(stacks.places for stacks in self._all_stacks)

    @property
    def counts(self) -> CacheCounts:
        """Lookups and misses that `used` told, bytes that were brought; `read_ahead`: experts fetched by `settle`."""
        return CacheCounts(self._lookups, self._misses, self._fetched, self._bytes_read)

    def stacks(self, layer: int) -> tuple[GpuMatrix, ...]:
        """What the places of a layer's experts are indices into, in the order of the source's matrices."""
        return self._stacks[layer].matrices

    def stacks_of(self, layer: int) -> tuple[GpuMatrix, ...] | None:
        """`stacks`; None for a layer that has no places at all."""
        found = self._stacks.get(layer)
        return None if found is None else found.matrices

    def table(self, layer: int) -> NDArray[np.int32]:
        """(experts,) the place of every expert of the layer, or -1; always the same array."""
        table: NDArray[np.int32] = self._tables[layer]
        return table

    @property
    def brought(self) -> int:
        """Places that all stacks have for experts of one step."""
        return min((stacks.brought for stacks in self._all_stacks), default=0)

    def brought_from(self, layer: int) -> int:
        """The first place for experts that are brought for one step."""
        return self._stacks[layer].places

    def load(self) -> None:
        """Brings the residents and seeds; returns when they are there, raises why one is not."""
        loads = self._bring_for_good(self._wanted)
        self._wanted = ()
        for key, load in loads.items():
            error = load.outcome()
            if error is not None:
                raise error
            del self._arriving[key]
            self._tables[key] = load.place

    def shrink(self) -> int:
        """Between steps: gives up a quarter of the places, with the least valuable experts; returns bytes freed.

        When there are none left, the places for experts of one step go; 0 where nothing is left, and stacks of resident
        layers stay as they are. What is kept is brought again, since smaller stacks lie elsewhere: `stacks` and
        `brought_from` are to be asked for anew. An expert that cannot be brought is logged and left out.
        """
        before, values = self.num_bytes, self._policy.values(len(self._tables) - 1)
        self._chosen.clear()
        for key in list(self._arriving):
            self._land(key, self._arriving.pop(key))
        kept: list[Key] = []
        remaining = []
        for stacks in self._all_stacks:
            if self._resident.isdisjoint(stacks.layers):
                wanted = [(layer, int(expert)) for layer in stacks.layers for expert in self._there(layer)]
                self._tables[list(stacks.layers)] = -1
                smaller = stacks.smaller(self._device)
                if smaller is None:
                    continue
                kept += sorted(wanted, key=lambda key: -float(values[key]))[: smaller.places]
                remaining.append(smaller)
            else:
                remaining.append(stacks)
        self._all_stacks = tuple(remaining)
        self._stacks = {layer: stacks for stacks in self._all_stacks for layer in stacks.layers}
        for key in self._bring_for_good(kept):
            self._land(key, self._arriving.pop(key))
        return before - self.num_bytes

    def bring(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Begins to bring experts for one step, in the middle of it and from any thread; returns their places.

        The GPU must be done with what the layer before had brought. ValueError for more experts than places.
        """
        stacks = self._stacks[layer]
        if len(experts) > stacks.brought:
            raise ValueError(f"{len(experts)} experts for the {stacks.brought} places that are kept for them")
        places = list(range(stacks.places, stacks.places + len(experts)))
        with self._lock:
            for expert, place in zip(experts, places, strict=True):
                self._brought.append(self._begin((layer, int(expert)), place, Priority.DEMAND))
        return places

    def call_when_brought(self, address: int, argument: int) -> None:
        """Calls the C function `void f(void *)` when everything that `bring` was asked for so far is there.

        Also where that failed: `take_failure` tells. Not on a stream: host functions of all streams may be called by
        one thread, and the one that waits for this call would hold it up.
        """
        function = _HostFunction(address)
        with self._lock:
            loads = list(self._brought)
        countdown = Countdown(len(loads), lambda: function(argument))
        for load in loads:
            load.when_done(countdown.one_less)

    def take_failure(self) -> StrataError | None:
        """After every step: why an expert that was brought for it is not there, if one is not."""
        with self._lock:
            loads, self._brought = self._brought, []
        errors = [load.outcome() for load in loads]
        return next((error for error in errors if error is not None), None)

    def used(self, tokens: NDArray[np.int64]) -> None:
        """After a step: the tokens of every expert, (layers, experts); rows of layers that are not the GPU's are 0."""
        for layer in sorted(self._stacks):
            experts = np.flatnonzero(tokens[layer])
            if not len(experts):
                continue
            missing = experts[self._tables[layer, experts] < 0]
            self._lookups += len(experts)
            self._misses += len(missing)
            if layer not in self._resident:
                self._uses.note(layer, experts, tokens[layer, experts])
                self._policy.used(layer, experts, None)
                self._missed |= dict.fromkeys((layer, expert) for expert in missing.tolist())

    def settle(self) -> None:
        """`land` and `fetch` at once."""
        self.land()
        self.fetch()

    def fetch(self) -> None:
        """At any time, by one thread: begins to fetch what `land` has made place for."""
        chosen, self._chosen = self._chosen, []
        for key, place in chosen:
            self._arriving[key] = self._begin(key, place, Priority.PREFETCH)

    def land(self) -> None:
        """Between steps: what has arrived is there from now on; what is worth more than a resident gets its place."""
        for key in [key for key, load in self._arriving.items() if load.is_done]:
            self._land(key, self._arriving.pop(key))
        coming = {*self._arriving, *(key for key, _ in self._chosen)}
        missed = [key for key in self._missed if self._tables[key] < 0 and key not in coming]
        self._missed.clear()
        if not missed or len(self._arriving) + len(self._chosen) >= FETCHES:
            return
        values = self._policy.values(len(self._tables) - 1)
        full: set[ExpertStacks] = set()  # for what is worth less, too
        for key in sorted(missed, key=lambda key: -float(values[key])):
            if len(self._arriving) + len(self._chosen) >= FETCHES:
                return
            stacks = self._stacks[key[0]]
            place = None if stacks in full else self._freed_place(key, values)
            if place is None:
                full.add(stacks)
                continue
            self._fetched += 1
            self._chosen.append((key, place))

    def close(self) -> None:
        """Ends the reads; may be called twice. Uploads that have begun are the engine's."""
        self._reader.close()
        with self._lock:
            brought = list(self._brought)
        for load in (*self._arriving.values(), *brought):
            load.abandon()

    def _seeded(self, slots: int, seeds: Sequence[Key]) -> tuple[Key, ...]:
        """What is to be there at first, none twice."""
        experts = self._tables.shape[1]
        needed = [(layer, expert) for layer in sorted(self._resident) for expert in range(experts)]
        if len(needed) > slots:
            raise ValueError(f"the {len(needed)} experts of resident layers need more than {slots} slots")
        return tuple(dict.fromkeys([*needed, *seeds]))[:slots]

    def _there(self, layer: int) -> NDArray[np.intp]:
        """Experts of a layer that have a place."""
        return np.flatnonzero(self._tables[layer] >= 0)

    def _bring_for_good(self, keys: Sequence[Key]) -> dict[Key, GpuExpertLoad]:
        """Begins to bring experts into free places."""
        loads = {key: self._begin(key, self._stacks[key[0]].free.pop(), Priority.AHEAD) for key in keys}
        self._arriving |= loads
        return loads

    def _begin(self, key: Key, place: int, priority: Priority) -> GpuExpertLoad:
        runs = self._source.runs(*key)
        self._bytes_read += sum(run.extent.num_bytes for run in runs)
        return GpuExpertLoad(runs, self.stacks(key[0]), place, self._reader, self._engine, priority)

    def _land(self, key: Key, load: GpuExpertLoad) -> None:
        error = load.outcome()
        if error is None:
            self._tables[key] = load.place
            return
        log.warning("expert %d of layer %d could not be brought to the GPU: %s", key[1], key[0], error)
        self._stacks[key[0]].free.append(load.place)

    def _freed_place(self, key: Key, values: NDArray[np.float64]) -> int | None:
        """A place for an expert: a free one, or that of the one worth least, if this one is clearly worth more."""
        stacks = self._stacks[key[0]]
        if stacks.free:
            return stacks.free.pop()
        layers = [layer for layer in stacks.layers if layer not in self._resident]
        rows, experts = np.nonzero(self._tables[layers] >= 0)
        if not len(rows):
            return None
        worth = values[layers][rows, experts]
        least = int(np.argmin(worth))
        if values[key] - worth[least] <= MARGIN * abs(worth[least]):
            return None
        victim = layers[int(rows[least])], int(experts[least])
        place = int(self._tables[victim])
        self._tables[victim] = -1
        return place
