"""Rows of keys and values are the same bits whichever device has put them in their blocks, and lose none on the way."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cpu_kernels.heads import Rotation as HostRotation
from cpu_kernels.heads import heads_row
from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS, KVLayout, KVMemory
from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from cpu_kernels.matrix import Matrix
from gpu_kernels.blocks import KVBlocks, Lanes, Rotation
from gpu_kernels.simulated import SimulatedDevice
from gpu_kernels.torch_kernels import TorchKernels
from planner.kv import keeps
from runtime.executor.hybrid.kv_blocks import empty_blocks, from_host, to_host
from runtime.executor.hybrid.kv_pool import KVPool
from tests.support.hybrid import FAST_GPU
from tests.support.kv_chunks import scattered_chunks
from tests.support.rows import address, floats, run

F16, BF16, Q8_0, Q4_0 = KVType.F16, KVType.BF16, KVType.Q8_0, KVType.Q4_0
HEADS = 3  # of keys; each serves two of queries
LAYOUTS = [
    KVLayout(HEADS, 64, 64, 512, Q8_0, Q4_0, rotates_keys=True, rotates_values=True),
    KVLayout(HEADS, 128, 64, 512, Q4_0, Q8_0, rotates_keys=True),
    KVLayout(HEADS, 8, 16, 512, Q4_0, Q4_0, rotates_keys=True, rotates_values=True),
    KVLayout(HEADS, 80, 50, 512, Q4_0, Q8_0),
    KVLayout(HEADS, 6, 20, 512, Q8_0, Q4_0),
    KVLayout(HEADS, 24, 40, 512, BF16, F16),
    KVLayout(HEADS, 16, 64, 512, F16, BF16),
]
TOKENS = 3 * BLOCK_TOKENS


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(FAST_GPU)


def inputs(layout: KVLayout) -> list[NDArray[np.float32]]:
    """Queries, keys and values; heads of zeros, of tiny and of great numbers among them."""
    widths = 2 * layout.key_length, layout.key_length, layout.value_length
    made = [floats(seed, TOKENS, HEADS * width) for seed, width in enumerate(widths)]
    for rows in made:
        rows[3], rows[4], rows[5] = 0, rows[4] * 1e-7, rows[5] * 300
    return made


def by_host(layout: KVLayout) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Queries, and the chunk that the CPU's kernels have filled."""
    chunk = scattered_chunks(layout, np.uint8(0))[0]
    table = np.array([address(chunk)], np.int64)
    pairs = layout.key_length // 2
    cos, sin = np.ones((TOKENS, pairs), np.float32), np.zeros((TOKENS, pairs), np.float32)
    rotation = HostRotation(address(cos), address(sin), pairs, neighbours=False)
    made = inputs(layout)
    memory = KVMemory(layout, address(table))
    run(heads_row(*(Matrix.of(rows) for rows in made), memory, rotation, tokens=TOKENS, start=0), threads=2)
    return made[0], chunk


def by_gpu(layout: KVLayout, blocks: KVBlocks) -> NDArray[np.float32]:
    """Queries; blocks 2, 0 and 1 are filled."""
    pairs = layout.key_length // 2
    rotation = Rotation(torch.ones((TOKENS, pairs)), torch.zeros((TOKENS, pairs)), neighbours=False)
    lanes = Lanes(torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([TOKENS], dtype=torch.int32))
    queries, keys, values = map(torch.from_numpy, inputs(layout))
    TorchKernels().heads(queries, keys, values, torch.arange(TOKENS, dtype=torch.int32), rotation, blocks, lanes)
    return queries.numpy()


def test_codes_are_the_same_on_both_devices(device: SimulatedDevice) -> None:
    for layout in LAYOUTS:
        queries, chunk = by_host(layout)
        blocks = empty_blocks(device, layout, 3)
        np.testing.assert_array_equal(by_gpu(layout, blocks), queries)
        keys, values = layout.keys_of(chunk), layout.values_of(chunk)
        for place, block in enumerate((2, 0, 1)):
            found = np.zeros_like(keys[:, 0]), np.zeros_like(values[:, 0])
            to_host(layout, [part[block] for part in blocks.parts], *found)
            np.testing.assert_array_equal(found[0], keys[:, place])
            np.testing.assert_array_equal(found[1], values[:, place])
    device.close()


def test_blocks_come_and_go(device: SimulatedDevice) -> None:
    """Through a pool, to places with garbage around."""
    stream = device.stream("test")
    for layout in LAYOUTS:
        _, chunk = by_host(layout)
        pool = KVPool(device, stream, {5: layout}, TOKENS)
        target = np.zeros_like(chunk)
        rows = [[(layout.keys_of(c)[:, b], layout.values_of(c)[:, b]) for b in range(3)] for c in (chunk, target)]
        for block, (keys, values) in zip((1, 2, 0), rows[0], strict=True):
            pool.write(5, block, keys, values)
        pool.read(5, [1, 2, 0], rows[1])
        assert PIECE_BLOCKS > 3
        np.testing.assert_array_equal(target, chunk)
        assert pool.blocks(5).token_bytes * BLOCK_TOKENS <= layout.block_bytes
    device.close()


def test_types_that_stay_on_the_cpu(device: SimulatedDevice) -> None:
    for kind in KVType:
        if keeps("hybrid", KVPolicy(kind, kind)):
            empty_blocks(device, KVLayout(2, 64, 64, 512, kind, kind), 1)
    with pytest.raises(ValueError, match="kivi4 cannot be on the GPU, whose kernels read f16, bf16, q8_0, q4_0"):
        empty_blocks(device, KVLayout(2, 64, 64, 512, KVType.KIVI4, F16), 1)
    device.close()


def test_the_way_back_is_exact(device: SimulatedDevice) -> None:
    """Whatever the bytes are."""
    rng = np.random.default_rng(1)
    for layout in LAYOUTS:
        blocks = empty_blocks(device, layout, 2)
        for part in blocks.parts:
            part.view(torch.uint8).copy_(torch.from_numpy(rng.integers(0, 256, part.view(torch.uint8).shape, np.uint8)))
        keys = np.zeros((HEADS, layout.key_block_bytes), np.uint8)
        values = np.zeros((HEADS, layout.value_block_bytes), np.uint8)
        to_host(layout, [part[0] for part in blocks.parts], keys, values)
        from_host(layout, keys, values, [part[1] for part in blocks.parts])
        for part in blocks.parts:
            assert torch.equal(part[0].view(torch.uint8), part[1].view(torch.uint8))
    device.close()
