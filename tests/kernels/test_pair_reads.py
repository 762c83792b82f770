"""Checksums of pages are those of xxHash; pairs get where they belong."""

import numpy as np
import pytest
import xxhash

from cpu_kernels.pair_reads import (
    JOB_FIELDS,
    PAGE_BYTES,
    Job,
    copy_pairs,
    page_sum,
    page_sums,
    pages_are_right,
    place_pairs,
)


def pages(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count * PAGE_BYTES, np.uint8)


@pytest.mark.parametrize("fill", [None, 0, 255])
def test_sums_of_pages_are_xxh64(fill: int | None) -> None:
    data = pages(5)
    if fill is not None:
        data[:] = fill
    wanted = [xxhash.xxh64_intdigest(data[start:][:PAGE_BYTES].data) for start in range(0, data.size, PAGE_BYTES)]
    assert page_sums(data).tolist() == wanted
    assert page_sum(data.ctypes.data) == wanted[0]


def test_any_flipped_bit_is_found() -> None:
    data = pages(2)
    sums = page_sums(data)
    for place in np.random.default_rng(1).integers(0, data.size * 8, 200):
        data[place // 8] ^= 1 << (place % 8)
        assert not pages_are_right(data.ctypes.data, data.nbytes, sums.ctypes.data)
        data[place // 8] ^= 1 << (place % 8)
    assert pages_are_right(data.ctypes.data, data.nbytes, sums.ctypes.data)


@pytest.mark.parametrize(("first_bytes", "second_bytes"), [(4096, 4096), (544, 576), (3, 5)])
def test_pairs_are_taken_apart_and_kept(first_bytes: int, second_bytes: int) -> None:
    count, pair_bytes, skipped = 4, first_bytes + second_bytes, 7
    file = np.random.default_rng(2).integers(0, 256, skipped + count * pair_bytes, np.uint8)
    pairs = file[skipped:].reshape(count, pair_bytes)
    firsts, seconds = np.zeros((count, first_bytes), np.uint8), np.zeros((count, second_bytes), np.uint8)
    kept = np.zeros((count, pair_bytes), np.uint8)
    copies = np.array([kept[0].ctypes.data, 0, kept[2].ctypes.data, 0], np.int64)
    job = np.zeros(JOB_FIELDS, np.int64)
    job[[Job.SKIPPED, Job.COUNT, Job.FIRST_BYTES, Job.SECOND_BYTES]] = skipped, count, first_bytes, second_bytes
    job[[Job.FIRST, Job.SECOND, Job.COPIES]] = firsts.ctypes.data, seconds.ctypes.data, copies.ctypes.data
    place_pairs(job.ctypes.data, file.ctypes.data)
    assert np.array_equal(np.concatenate([firsts, seconds], axis=1), pairs)
    assert np.array_equal(kept[[0, 2]], pairs[[0, 2]])
    assert not kept[[1, 3]].any()
    firsts[:] = seconds[:] = 0
    places = [matrix.ctypes.data + np.arange(count) * matrix.shape[1] for matrix in (kept, firsts, seconds)]
    copy_pairs(*[place[[0, 2]] for place in places], first_bytes, second_bytes)
    assert np.array_equal(np.concatenate([firsts, seconds], axis=1), kept)
