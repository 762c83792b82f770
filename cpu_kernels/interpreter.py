"""The jitted loop that every thread of a pool runs: rows in turn, their chunks shared out, waits and signals.

Knows nothing of Python's threads or of what the operations do. All state is a block of int64 (`Control` says where
what is), so that the block alone connects the threads.

How work is shared. A row's chunks are taken by compare-and-swap from slots that hold (number of the row << 20 | next
chunk). Rows that are split evenly have one slot a thread: a thread takes the chunks of its own contiguous slice and, if
the row is not over a moment later, those that are left in others' slices. Rows with a chunk size have one slot for all.
Numbers of rows grow for ever, so nothing is reset, and a thread that comes late finds newer numbers and does nothing. A
row is over when the count of chunks done reaches its sum: not when every thread has come by. So a thread that is
preempted between two chunks delays nobody, which matters where other processes compete for the cores. Who gets a chunk
never changes a result: operations see to that.
"""

from enum import IntEnum

from cpu_kernels.native import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap_if,
    call_clock,
    call_operation,
    int_at,
    jitted,
    pause,
    set_int,
)
from cpu_kernels.program import FIRST_ARGUMENT, LINE_BYTES, ROW_FIELDS, Kind
from cpu_kernels.waiting import (
    SPIN,
    SPINS_BETWEEN_SLEEPS,
    Setting,
    raise_counter,
    sleep_on,
    wait_for_counter,
    wait_until,
    wake,
)

CHUNK_BITS = 20
PARTS = 8  # chunks of a thread's slice: what a slower thread has not begun, others take
SPINS_BEFORE_HELPING = 25  # about 0.5 us: looking at another thread's slot takes its cache line away


class Control(IntEnum):
    """Byte offsets in the control block; what different threads write lies on different lines."""

    EPOCH = 0  # grows with every run; idle workers sleep on it
    SLEEPERS = LINE_BYTES  # workers asleep on EPOCH
    DONE = 2 * LINE_BYTES  # chunks done since the pool was made
    DONE_SLEEPERS = 3 * LINE_BYTES
    INSIDE = 4 * LINE_BYTES  # workers in the current run
    OPEN = 5 * LINE_BYTES  # whether workers may join the run; what follows is written while it is 0 and nobody inside
    TABLE = 5 * LINE_BYTES + 8
    ROWS = 5 * LINE_BYTES + 16
    FIRST_NUMBER = 5 * LINE_BYTES + 24
    DONE_BEFORE = 5 * LINE_BYTES + 32
    STATUS = 5 * LINE_BYTES + 40  # address of the program's status
    TICKS = 5 * LINE_BYTES + 48  # address of an int64 a row and one before them, or 0
    THREADS = 5 * LINE_BYTES + 56
    FAILED_ROW = 6 * LINE_BYTES
    STOP = 7 * LINE_BYTES
    SETTINGS = 8 * LINE_BYTES
    TIME = 9 * LINE_BYTES  # where the first thread puts a timespec
    SHARED_SLOT = 10 * LINE_BYTES
    SLOTS = 11 * LINE_BYTES  # one line a thread


# numba wants plain integers
EPOCH, SLEEPERS, INSIDE, OPEN = int(Control.EPOCH), int(Control.SLEEPERS), int(Control.INSIDE), int(Control.OPEN)
DONE, DONE_SLEEPERS, DONE_BEFORE = int(Control.DONE), int(Control.DONE_SLEEPERS), int(Control.DONE_BEFORE)
TABLE, ROWS, FIRST_NUMBER = int(Control.TABLE), int(Control.ROWS), int(Control.FIRST_NUMBER)
STATUS, FAILED_ROW, THREADS, STOP = (
    int(Control.STATUS),
    int(Control.FAILED_ROW),
    int(Control.THREADS),
    int(Control.STOP),
)
SETTINGS, TICKS, TIME = int(Control.SETTINGS), int(Control.TICKS), int(Control.TIME)
SHARED_SLOT, SLOTS = int(Control.SHARED_SLOT), int(Control.SLOTS)
SYSCALL, CLOCK, IDLE_SPIN = int(Setting.SYSCALL), int(Setting.CLOCK), int(Setting.IDLE_SPIN)
COMPUTE, WAIT, SIGNAL, NOTHING = (int(kind) for kind in Kind)
ROW_BYTES = 8 * ROW_FIELDS
ARGUMENTS = 8 * FIRST_ARGUMENT
CLOCK_MONOTONIC = 1


@jitted("int64(int64, int64, int64)")
def take(slot: int, number: int, chunks: int) -> int:
    """The next chunk of the row with this number, or -1 when none is left or the row is over."""
    first = number << CHUNK_BITS
    while True:
        seen = atomic_load(slot)
        chunk: int = max(seen - first, 0)
        if chunk >= chunks:
            return -1
        if atomic_swap_if(slot, seen, first + chunk + 1):
            return chunk


@jitted("void(int64, int64, int64, int64, int64)")
def execute(control: int, row: int, index: int, begin: int, end: int) -> None:
    """Does the items [begin, end) of a row, unless an operation failed before."""
    status: int = int_at(control + STATUS)
    if atomic_load(status) != 0:
        return
    kind, args = int_at(row + 24), row + ARGUMENTS
    if kind == COMPUTE:
        call_operation(int_at(row), args, begin, end)
    elif kind == WAIT:
        error = wait_for_counter(control + SETTINGS, int_at(args), int_at(args + 8))
        if error != 0:
            atomic_swap_if(status, 0, error)
    elif kind == SIGNAL:
        raise_counter(control + SETTINGS, int_at(args), int_at(args + 8))
    if atomic_load(status) != 0:
        atomic_swap_if(control + FAILED_ROW, -1, index)


@jitted("int64(int64, int64, int64, int64, int64)")
def share_slice(control: int, row: int, index: int, number: int, owner: int) -> int:
    """Takes part in one thread's slice of a row that is split evenly; returns how many chunks this thread did."""
    threads, items = int_at(control + THREADS), int_at(row + 8)
    if owner >= items:
        return 0
    parts = min(PARTS, max(1, items // threads))
    units = min(threads, items) * parts
    slot = control + SLOTS + LINE_BYTES * owner
    done = 0
    part = take(slot, number, parts)
    while part >= 0:
        unit = owner * parts + part
        execute(control, row, index, items * unit // units, items * (unit + 1) // units)
        done += 1
        part = take(slot, number, parts)
    return done


@jitted("int64(int64, int64, int64, int64, int64)")
def share_others(control: int, row: int, index: int, number: int, thread: int) -> int:
    """Takes what is left of the other threads' slices; returns how many chunks this thread did."""
    threads = int_at(control + THREADS)
    done = 0
    for step in range(1, threads):
        owner = thread + step
        if owner >= threads:
            owner -= threads
        done += share_slice(control, row, index, number, owner)
    return done


@jitted("int64(int64, int64, int64, int64)")
def share_chunks(control: int, row: int, index: int, number: int) -> int:
    """Takes part in a row whose chunks are handed out one after the other; returns how many this thread did."""
    items, chunk = int_at(row + 8), int_at(row + 16)
    chunks = (items + chunk - 1) // chunk
    done = 0
    part = take(control + SHARED_SLOT, number, chunks)
    while part >= 0:
        execute(control, row, index, part * chunk, min(items, (part + 1) * chunk))
        done += 1
        part = take(control + SHARED_SLOT, number, chunks)
    return done


@jitted("boolean(int64, int64, int64)")
def is_over(control: int, done: int, target: int) -> bool:
    """Adds to the chunks done; whether that was the row's last. Wakes who sleeps if so."""
    if done == 0 or atomic_add(control + DONE, done) + done != target:
        return False
    if atomic_load(control + DONE_SLEEPERS) > 0:
        wake(control + SETTINGS, control + DONE)
    return True


@jitted("boolean(int64, int64)")
def is_soon_over(control: int, target: int) -> bool:
    """Waits a moment for a row to end; whether it did."""
    for _ in range(SPINS_BEFORE_HELPING):
        if atomic_load(control + DONE) >= target:
            return True
        pause()
    return False


@jitted("void(int64, int64)")
def tick(control: int, address: int) -> None:
    """Stores nanoseconds of the monotonic clock."""
    call_clock(int_at(control + SETTINGS + CLOCK), CLOCK_MONOTONIC, control + TIME)
    set_int(address, int_at(control + TIME) * 1_000_000_000 + int_at(control + TIME + 8))


@jitted("void(int64, int64)")
def run_rows(control: int, thread: int) -> None:
    """Takes part in the current run from its first row to its last. Thread 0 keeps the times."""
    row, rows = int_at(control + TABLE), int_at(control + ROWS)
    number, target = int_at(control + FIRST_NUMBER), int_at(control + DONE_BEFORE)
    threads = int_at(control + THREADS)
    ticks = int_at(control + TICKS) if thread == 0 else 0
    if ticks != 0:
        tick(control, ticks)
    for index in range(rows):
        items, chunk = int_at(row + 8), int_at(row + 16)
        if items > 0 and int_at(row + 24) != NOTHING:
            if threads == 1:
                execute(control, row, index, 0, items)
            else:
                if chunk > 0:
                    target += (items + chunk - 1) // chunk
                    over = is_over(control, share_chunks(control, row, index, number), target)
                else:
                    target += min(threads, items) * min(PARTS, max(1, items // threads))
                    over = is_over(control, share_slice(control, row, index, number, thread), target)
                    if not over and not is_soon_over(control, target):
                        over = is_over(control, share_others(control, row, index, number, thread), target)
                if not over:
                    wait_until(control + SETTINGS, control + DONE, control + DONE_SLEEPERS, target)
        row += ROW_BYTES
        number += 1
        if ticks != 0:
            ticks += 8
            tick(control, ticks)


@jitted("void(int64)")
def open_run(control: int) -> None:
    """Lets workers into the run that the control block describes, and wakes those who sleep on a futex."""
    atomic_store(control + OPEN, 1)
    atomic_add(control + EPOCH, 1)
    if atomic_load(control + SLEEPERS) > 0:
        wake(control + SETTINGS, control + EPOCH)


@jitted("void(int64)")
def lead_run(control: int) -> None:
    """The calling thread's part of an open run; returns when it is over and every worker has left it."""
    run_rows(control, 0)
    atomic_store(control + OPEN, 0)
    spins = int_at(control + SETTINGS + SPIN)
    inside = atomic_load(control + INSIDE)
    while inside > 0:
        pause()
        spins -= 1
        if spins <= 0:
            sleep_on(control + SETTINGS, control + INSIDE, inside)
            spins = SPINS_BETWEEN_SLEEPS
        inside = atomic_load(control + INSIDE)
    set_int(control + FIRST_NUMBER, int_at(control + FIRST_NUMBER) + int_at(control + ROWS))
    set_int(control + DONE_BEFORE, atomic_load(control + DONE))


@jitted("void(int64)")
def run(control: int) -> None:
    """A whole run."""
    if int_at(control + THREADS) > 1:
        open_run(control)
    lead_run(control)


@jitted("int64(int64, int64, int64)")
def follow(control: int, thread: int, last: int) -> int:
    """A worker: joins every run after epoch `last`. Returns -1 when the pool stops, the epoch if idle without futex."""
    while True:
        spins = int_at(control + SETTINGS + IDLE_SPIN)
        epoch = atomic_load(control + EPOCH)
        while epoch == last and atomic_load(control + STOP) == 0:
            pause()
            spins -= 1
            if spins <= 0:
                if int_at(control + SETTINGS + SYSCALL) == 0:
                    return last
                atomic_add(control + SLEEPERS, 1)
                if atomic_load(control + EPOCH) == last and atomic_load(control + STOP) == 0:
                    sleep_on(control + SETTINGS, control + EPOCH, last)
                atomic_add(control + SLEEPERS, -1)
                spins = SPINS_BETWEEN_SLEEPS
            epoch = atomic_load(control + EPOCH)
        if atomic_load(control + STOP) != 0:
            return -1
        last = epoch
        atomic_add(control + INSIDE, 1)
        if atomic_load(control + OPEN) != 0:
            run_rows(control, thread)
        if atomic_add(control + INSIDE, -1) == 1 and atomic_load(control + OPEN) == 0:
            wake(control + SETTINGS, control + INSIDE)


@jitted("void(int64)")
def stop(control: int) -> None:
    """Makes every worker return; those on a futex wake up."""
    atomic_store(control + STOP, 1)
    atomic_add(control + EPOCH, 1)
    wake(control + SETTINGS, control + EPOCH)
