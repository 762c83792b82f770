"""Where the experts lie that do not all fit in memory: tables that programs read, and the row that looks experts up.

A *slot* holds one expert in *parts* that arrive one by one; a part has a counter that is raised when it has arrived.
For every layer, part and expert the table has four int64: bytes from the first slot to the expert's (`DISTANCE`), the
address of the part's counter (`COUNTER`, 0 while the expert has no slot), what the counter will have reached when the
part is there (`TARGET`), and nothing. Knows nothing about files or about which experts should be kept.
Invariant: tables of a layer are changed only while its rows do not run, or by the call that its look-up row makes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.native import (
    add_double,
    atomic_load,
    atomic_swap_if,
    call_operation,
    int32_at,
    int_at,
    operation,
    set_int,
    set_int32,
)
from cpu_kernels.program import LINE_BYTES, Field, Row, aligned_int64
from cpu_kernels.python_calls import PythonCall, PythonCalls
from cpu_kernels.waiting import COUNTER_ERROR, fail_counter, raise_counter, wait_for_counter, waiting_settings

PLACE_BYTES = 32
DISTANCE, COUNTER, TARGET = 0, 8, 16
COUNTER_BYTES = 2 * LINE_BYTES
SEGMENT_BYTES = 16  # as in `experts`

Miss = Callable[[int, NDArray[np.int64], int], None]
"""(layer, experts of it that have no slot, how many experts of it are used): gives them slots before it returns."""

Foresee = Callable[[int, NDArray[np.int64], int], None]
"""(layer, experts that it may soon use and that have no slot, the likeliest first, the layer that is computed now)."""


class ExpertSlots:
    """Tables for `slots` slots of `slot_bytes` that experts of `layers` x `experts` share."""

    def __init__(self, layers: int, experts: int, parts: int, *, slots: int, slot_bytes: int) -> None:
        self.layers, self.experts, self.parts = layers, experts, parts
        self.slots, self.slot_bytes = slots, slot_bytes
        self.clock = aligned_int64(2)  # layers that were looked up, experts that were
        self.last_used = np.zeros((layers, experts), np.int64)
        self.counts = np.zeros((layers, experts), np.float64)
        self.tells = aligned_int64(layers)  # not 0: `miss` is called for the layer even where no expert is missing
        self._places = aligned_int64(layers * parts * experts * 4).reshape(layers, parts, experts, 4)
        self._counters = aligned_int64(slots * parts * COUNTER_BYTES // 8).reshape(slots, parts, COUNTER_BYTES // 8)
        # as Python writes and reads them: an item of an array takes it ten times as long
        self._place_items = self._places.data.cast("B").cast("q")
        self._first_counter = int(self._counters.ctypes.data)
        self._counter_items = self._counters.data.cast("B").cast("q")
        self._settings = waiting_settings()
        self._settings_address = int(self._settings.ctypes.data)
        self._missing = aligned_int64(experts + 2)
        self._scratch = np.zeros((experts, 4), np.int32)
        self._calls = PythonCalls()

    @property
    def lookups(self) -> int:
        """How many experts were looked up so far."""
        return int(self.clock[1])

    @property
    def settings_address(self) -> int:
        """Of the settings for waiting."""
        return self._settings_address

    def places(self, layer: int, part: int) -> int:
        """The address of a layer's table for a part."""
        return int(self._places[layer, part].ctypes.data)

    def assign(self, layer: int, expert: int, slot: int) -> None:
        """Gives an expert a slot; its parts are there when each was told to have `landed` once more."""
        for part in range(self.parts):
            item = self._place_item(layer, part, expert)
            reached = self._counter_items[(slot * self.parts + part) * COUNTER_BYTES // 8]
            self._place_items[item + DISTANCE // 8] = slot * self.slot_bytes
            self._place_items[item + TARGET // 8] = reached + 1
            self._place_items[item + COUNTER // 8] = self._counter(slot, part)

    def release(self, layer: int, expert: int) -> None:
        """The expert has no slot any more."""
        for part in range(self.parts):
            self._place_items[self._place_item(layer, part, expert) + COUNTER // 8] = 0

    def has_slot(self, layer: int) -> NDArray[np.bool_]:
        """(experts,) those of a layer that have a slot, be they there already or still arriving."""
        return np.asarray(self._places[layer, 0, :, COUNTER // 8] != 0)

    def landed(self, slot: int, part: int) -> None:
        """A part of the expert that was given this slot is there: wakes who waits for it."""
        raise_counter(self.settings_address, self._counter(slot, part), 1)

    def failed(self, slot: int, part: int, code: int) -> None:
        """A part will not come: programs that wait for it end with this code, which is not 0."""
        fail_counter(self.settings_address, self._counter(slot, part), code)

    def forget_failure(self, slot: int, part: int) -> None:
        """Makes a counter that failed as good as new; only while nobody waits for it."""
        self._counters[slot, part, COUNTER_ERROR // 8] = 0

    def lookup_row(self, layer: int, segments: int, most: Field, *, dense_from: int, status: int, miss: Miss) -> Row:
        """Looks the segments' experts up, counts their use, and has those without a slot given one by `miss`.

        `miss` is also called, without missing experts, when `dense_from` experts or more are used or the layer `tells`.
        Then moves the segments of experts that are there before those that are still to arrive. What `miss` raises
        ends the run and is kept for `take_failure`. `status`: `Program.status_address`.
        """
        callback = self._callback(miss, status)
        args = (
            *(segments, most, self.places(layer, 0), self.last_used[layer].ctypes.data),
            *(self.counts[layer].ctypes.data, self.clock.ctypes.data, self._missing.ctypes.data),
            *(callback.address, layer, dense_from, self._scratch.ctypes.data),
            self.tells[layer:].ctypes.data,
        )
        return Row("look_up_experts", _look_up, 1, args, keep=(self, callback))

    def foresee_row(
        self, layer: int, topk_ids: int, tokens: Field, *, used: int, current: int, status: int, foresee: Foresee
    ) -> Row:
        """Calls `foresee` with those of topk_ids (tokens, used) that have no slot of `layer`, unless all have.

        `current`: the layer that is computed now. What `foresee` raises ends the run, as for `lookup_row`.
        """
        callback = self._callback(foresee, status)
        args = (
            *(topk_ids, tokens, used, self.places(layer, 0), self._missing.ctypes.data),
            *(callback.address, layer, current),
        )
        return Row("foresee_experts", _foresee, 1, args, keep=(self, callback))

    def take_failure(self) -> BaseException | None:
        """What `miss` raised in the last run; asked for once."""
        return self._calls.take_failure()

    def _callback(self, call: Miss, status: int) -> PythonCall:
        """Calls with what `_missing` holds, and the number that the row gives."""

        def on_missing(number: int) -> None:
            count = int(self._missing[1])
            call(int(self._missing[0]), self._missing[2 : 2 + count].copy(), number)

        return self._calls.callback(on_missing, status)

    def _counter(self, slot: int, part: int) -> int:
        return self._first_counter + (slot * self.parts + part) * COUNTER_BYTES

    def _place_item(self, layer: int, part: int, expert: int) -> int:
        """The first of a place's four numbers."""
        return ((layer * self.parts + part) * self.experts + expert) * PLACE_BYTES // 8


@operation
def _look_up(args: Any, begin: int, end: int) -> None:
    """One item."""
    segments, most, places, last_used, counts = args[0], args[1], args[2], args[3], args[4]
    clock, missing, callback, layer, dense_from, scratch = args[5], args[6], args[7], args[8], args[9], args[10]
    tells = args[11]
    now = int_at(clock) + 1
    set_int(clock, now)
    used = 0
    absent = 0
    while used < most and int32_at(segments + SEGMENT_BYTES * used + 8) > 0:
        entry = segments + SEGMENT_BYTES * used
        expert = int32_at(entry)
        set_int(last_used + 8 * expert, now)
        add_double(counts + 8 * expert, int32_at(entry + 8))
        if int_at(places + PLACE_BYTES * expert + COUNTER) == 0:
            set_int(missing + 8 * (2 + absent), expert)
            absent += 1
        used += 1
    set_int(clock + 8, int_at(clock + 8) + used)
    if absent > 0 or used >= dense_from or int_at(tells) != 0:
        set_int(missing, layer)
        set_int(missing + 8, absent)
        call_operation(callback, missing, used, used)
    late = 0
    kept = 0
    for index in range(used):
        entry = segments + SEGMENT_BYTES * index
        place = places + PLACE_BYTES * int32_at(entry)
        counter = int_at(place + COUNTER)
        if counter != 0 and atomic_load(counter) >= int_at(place + TARGET):
            target = segments + SEGMENT_BYTES * kept
            kept += 1
        else:
            target = scratch + SEGMENT_BYTES * late
            late += 1
        if target != entry:
            for field in range(0, SEGMENT_BYTES, 4):
                set_int32(target + field, int32_at(entry + field))
    for index in range(late):
        for field in range(0, SEGMENT_BYTES, 4):
            set_int32(
                segments + SEGMENT_BYTES * (kept + index) + field, int32_at(scratch + SEGMENT_BYTES * index + field)
            )


@operation
def _foresee(args: Any, begin: int, end: int) -> None:
    """One item."""
    topk_ids, tokens, used, places, missing = args[0], args[1], args[2], args[3], args[4]
    absent = 0
    for choice in range(used):  # all tokens' first choices come first
        for token in range(tokens):
            expert = int32_at(topk_ids + 4 * (token * used + choice))
            is_new = int_at(places + PLACE_BYTES * expert + COUNTER) == 0
            for index in range(absent):
                is_new = is_new and int_at(missing + 8 * (2 + index)) != expert
            if is_new:
                set_int(missing + 8 * (2 + absent), expert)
                absent += 1
    if absent > 0:
        set_int(missing, args[6])
        set_int(missing + 8, absent)
        call_operation(args[5], missing, args[7], args[7])


@operation
def await_part(args: Any, begin: int, end: int) -> None:
    """Waits for a part. Arguments: settings, status, then a place's counter and target."""
    settings, status, counter, target = args[0], args[1], args[2], args[3]
    error = 1 if counter == 0 else wait_for_counter(settings, counter, target)
    if error != 0:
        atomic_swap_if(status, 0, error)
