"""Reads runs of pairs from a file, checks them and puts them where they belong, without the interpreter lock.

A *pair* is two parts that lie side by side in the file and apart in memory. A run is read into memory of the thread
that reads it, whole pages, each of which is checked by its XXH64 (the xxHash specification 0.1.1). Knows nothing about
what pairs hold, nor about who asks. Jobs come as addresses through a pipe, so that any thread takes the next; who asked
for a batch of jobs is told through another pipe when the last is over.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.native import atomic_add, atomic_load, call_io, copy_bytes, int_at, jitted, set_int

Ints = NDArray[np.int64]

PAGE_BYTES = 4096  # that have a checksum of their own
ADDRESS_BYTES = 8


class Job(IntEnum):
    """What a job consists of: int64 in this order."""

    FILE = 0  # a descriptor
    OFFSET = 1  # of the first page in the file
    NUM_BYTES = 2  # whole pages
    SUMS = 3  # address of the pages' checksums
    SKIPPED = 4  # bytes before the first pair
    COUNT = 5  # of pairs
    FIRST_BYTES = 6
    SECOND_BYTES = 7
    FIRST = 8  # address for the first parts, one after the other
    SECOND = 9  # and for the second ones
    COPIES = 10  # address of the addresses, one for each pair, that it is copied to as it lies in the file, or 0
    BATCH = 11  # address of an int64: jobs of the batch that are not over
    RESULT = 12  # one of `Result`


class Result(IntEnum):
    """How a job ended."""

    PENDING = 0
    DONE = 1
    NOT_READ = 2
    NOT_RIGHT = 3


class Calls(IntEnum):
    """What a thread that reads is given: int64 in this order."""

    READ = 0  # addresses of libc's functions
    WRITE = 1
    PREAD = 2
    JOBS = 3  # descriptors: where jobs come from
    OVER = 4  # where the end of a batch is told


GIVEN_UP = -(1 << 40)  # added to a batch that nobody waits for any more
JOB_FIELDS, CALL_FIELDS = len(Job), len(Calls)
_FILE, _OFFSET, _NUM_BYTES, _SUMS = 8 * Job.FILE, 8 * Job.OFFSET, 8 * Job.NUM_BYTES, 8 * Job.SUMS
_SKIPPED, _COUNT, _FIRST_BYTES, _SECOND_BYTES = (
    8 * Job.SKIPPED,
    8 * Job.COUNT,
    8 * Job.FIRST_BYTES,
    8 * Job.SECOND_BYTES,
)
_FIRST, _SECOND, _COPIES, _BATCH, _RESULT = 8 * Job.FIRST, 8 * Job.SECOND, 8 * Job.COPIES, 8 * Job.BATCH, 8 * Job.RESULT
_DONE, _NOT_READ, _NOT_RIGHT = int(Result.DONE), int(Result.NOT_READ), int(Result.NOT_RIGHT)
_READ, _WRITE, _PREAD, _JOBS, _OVER = (8 * int(field) for field in Calls)
_PRIME_1, _PRIME_2, _PRIME_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME_4 = 0x85EBCA77C2B2AE63
_STRIPE_BYTES = 32


@jitted("uint64(uint64, int64)")
def _turned(number: np.uint64, bits: int) -> np.uint64:
    return (number << np.uint64(bits)) | (number >> np.uint64(64 - bits))


@jitted("uint64(uint64, uint64)")
def _round(lane: np.uint64, word: np.uint64) -> np.uint64:
    turned: np.uint64 = _turned(lane + word * np.uint64(_PRIME_2), 31)
    return turned * np.uint64(_PRIME_1)


@jitted("uint64(uint64, uint64)")
def _merged(total: np.uint64, lane: np.uint64) -> np.uint64:
    return (total ^ _round(np.uint64(0), lane)) * np.uint64(_PRIME_1) + np.uint64(_PRIME_4)


@jitted("uint64(int64)")
def page_sum(page: int) -> np.uint64:
    """XXH64 of the page at an address, with the seed 0."""
    one, two = np.uint64(_PRIME_1) + np.uint64(_PRIME_2), np.uint64(_PRIME_2)
    three, four = np.uint64(0), np.uint64(0) - np.uint64(_PRIME_1)
    for stripe in range(page, page + PAGE_BYTES, _STRIPE_BYTES):
        one = _round(one, np.uint64(int_at(stripe)))
        two = _round(two, np.uint64(int_at(stripe + 8)))
        three = _round(three, np.uint64(int_at(stripe + 16)))
        four = _round(four, np.uint64(int_at(stripe + 24)))
    total = _turned(one, 1) + _turned(two, 7) + _turned(three, 12) + _turned(four, 18)
    total = _merged(_merged(_merged(_merged(total, one), two), three), four) + np.uint64(PAGE_BYTES)
    total = (total ^ (total >> np.uint64(33))) * np.uint64(_PRIME_2)
    total = (total ^ (total >> np.uint64(29))) * np.uint64(_PRIME_3)
    return total ^ (total >> np.uint64(32))


@jitted("boolean(int64, int64, int64)")
def pages_are_right(pages: int, num_bytes: int, sums: int) -> bool:
    """Whether pages have the checksums at the address `sums`."""
    for start in range(0, num_bytes, PAGE_BYTES):
        if page_sum(pages + start) != np.uint64(int_at(sums + start // PAGE_BYTES * ADDRESS_BYTES)):
            return False
    return True


@jitted("void(int64, int64, int64)")
def _sum_pages(pages: int, num_bytes: int, sums: int) -> None:
    for start in range(0, num_bytes, PAGE_BYTES):
        set_int(sums + start // PAGE_BYTES * ADDRESS_BYTES, np.int64(page_sum(pages + start)))


def page_sums(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """XXH64 of every page of `data`, whole pages."""
    sums = np.empty(data.nbytes // PAGE_BYTES, np.uint64)
    _sum_pages(data.ctypes.data, data.nbytes, sums.ctypes.data)
    return sums


@jitted("void(int64, int64)")
def place_pairs(job: int, pages: int) -> None:
    """Puts a job's pairs where they belong, from the pages that hold them."""
    first_bytes, second_bytes = int_at(job + _FIRST_BYTES), int_at(job + _SECOND_BYTES)
    first, second, copies = int_at(job + _FIRST), int_at(job + _SECOND), int_at(job + _COPIES)
    pair = pages + int_at(job + _SKIPPED)
    for number in range(int_at(job + _COUNT)):
        copy_bytes(first + number * first_bytes, pair, first_bytes)
        copy_bytes(second + number * second_bytes, pair + first_bytes, second_bytes)
        copy = int_at(copies + number * ADDRESS_BYTES)
        if copy != 0:
            copy_bytes(copy, pair, first_bytes + second_bytes)
        pair += first_bytes + second_bytes


@jitted("void(int64[:], int64[:], int64[:], int64, int64)")
def copy_pairs(pairs: Ints, firsts: Ints, seconds: Ints, first_bytes: int, second_bytes: int) -> None:
    """From addresses of whole pairs to those of their parts."""
    for number in range(pairs.size):
        copy_bytes(firsts[number], pairs[number], first_bytes)
        copy_bytes(seconds[number], pairs[number] + first_bytes, second_bytes)


@jitted("int64(int64, int64, int64)")
def _read(pread: int, job: int, memory: int) -> int:
    """How a job ended."""
    num_bytes = int_at(job + _NUM_BYTES)
    if call_io(pread, int_at(job + _FILE), memory, num_bytes, int_at(job + _OFFSET)) != num_bytes:
        return _NOT_READ
    if not pages_are_right(memory, num_bytes, int_at(job + _SUMS)):
        return _NOT_RIGHT
    if atomic_load(int_at(job + _BATCH)) > 0:  # somebody waits for it
        place_pairs(job, memory)
    return _DONE


@jitted("void(int64, int64, int64)")
def serve(calls: int, message: int, memory: int) -> None:
    """The life of a thread that reads: jobs that come through a pipe, until that is closed.

    `message`: an int64 of the thread's own; `memory`: for the pages of a job.
    """
    while True:
        count = call_io(int_at(calls + _READ), int_at(calls + _JOBS), message, ADDRESS_BYTES, 0)
        if count == 0:
            return
        if count == ADDRESS_BYTES:
            job = int_at(message)
            set_int(job + _RESULT, _read(int_at(calls + _PREAD), job, memory))
            if atomic_add(int_at(job + _BATCH), -1) == 1:
                call_io(int_at(calls + _WRITE), int_at(calls + _OVER), message, ADDRESS_BYTES, 0)
