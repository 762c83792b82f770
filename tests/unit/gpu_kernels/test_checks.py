"""What operations refuse: shapes that do not fit by ValueError, types by TypeError, with the numbers at fault."""

from collections.abc import Callable

import pytest
import torch

from gpu_kernels import checks
from gpu_kernels.blocks import KVBlocks, KVRows, Lanes, Rotation
from gpu_kernels.matrix import GpuMatrix

X = torch.zeros((4, 64))
IDS = torch.zeros((4, 2), dtype=torch.int32)
SINGLE, STACK = GpuMatrix.allocate("Q8_0", 6, 64), GpuMatrix.allocate("Q8_0", 6, 64, slots=2)
ROWS = KVRows(torch.zeros((2, 4, 2, 8)).half(), 8)
CODES, SCALES = torch.zeros((2, 4, 2, 8), dtype=torch.int8), torch.zeros((2, 4, 2, 1)).half()
CACHE = KVBlocks(ROWS, ROWS)
LANES = Lanes(torch.zeros((2, 1), dtype=torch.int32), torch.ones(2, dtype=torch.int32))
TURN = Rotation(torch.zeros((3, 4)), torch.zeros((3, 4)), True)
POSITIONS = torch.zeros(4, dtype=torch.int32)
KEYS = torch.zeros((4, 16))


def heads(**changed: object) -> None:
    arguments = {"queries": X, "keys": KEYS, "values": KEYS, "positions": POSITIONS, "rotation": TURN}
    checks.check_heads(**(arguments | {"cache": CACHE, "lanes": LANES, "norms": (None, None)} | changed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checks.check_rows("add", x=X[0]), r"add: x of shape \(64,\)"),
        (lambda: checks.check_rows("add", x=X.T), "strides"),
        (lambda: checks.check_same("add", out=X, x=X[:2]), "shapes differ"),
        (lambda: checks.check_matmul(X, SINGLE, X, None), "matmul: x"),
        (lambda: checks.check_matmul(X, STACK, X[:, :6], None), "slots: 2"),
        (lambda: checks.check_matmul(X, SINGLE, X[:, :6], torch.zeros(5)), r"bias of shape \(5,\), not \(6,\)"),
        (lambda: checks.check_expert_matmul(X, SINGLE, IDS, X[:, :6], None), "None slots"),
        (lambda: checks.check_expert_matmul(X, STACK, IDS, X[:, :6], None), r"not \(n, 4\)"),
        (lambda: checks.check_gather(X, IDS[:, 0].contiguous(), X[:, :6]), "64 columns into 6"),
        (lambda: checks.check_scatter(X[:, :6], X, X[:, 0].contiguous(), POSITIONS, POSITIONS[:1]), "64 columns"),
        (lambda: checks.check_norm("rms_norm", X, X[0], X, 3), "64 columns in 3 heads"),
        (lambda: checks.check_gate(X, X, X, "tanh"), "'tanh' is none of silu, gelu"),
        (lambda: checks.check_gated(X, X, X), "for 4 tokens"),
        (lambda: checks.check_attention(X[:3], CACHE, LANES, X[:3], None), "3 tokens in 2 lanes"),
        (lambda: checks.check_attention(X, CACHE, LANES, KEYS, None), "attention: queries"),
        (lambda: checks.check_attention(X[:, :24], CACHE, LANES, X[:, :24], None), "3 heads share 2"),
        (lambda: checks.check_attention(X, CACHE, LANES, X, 0), "window of 0"),
        (lambda: checks.check_chosen("route", X, torch.zeros((4, 3)), IDS), "route"),
        (lambda: heads(keys=X), "heads: queries"),
        (lambda: heads(values=X), "heads: values"),
        (lambda: heads(rotation=Rotation(torch.zeros((3, 5)), torch.zeros((3, 5)), True)), "5 pairs turn"),
        (lambda: heads(norms=(torch.ones(8), None)), "both normed, or neither"),
        (lambda: Rotation(torch.zeros(3), torch.zeros(3), True), "cosines"),
        (lambda: Lanes(LANES.table, LANES.lengths[:1]), "block table"),
        (lambda: KVBlocks(ROWS, KVRows(ROWS.numbers[:1], 8)), "keys"),
        (lambda: KVRows(ROWS.numbers, 9), "heads of 9"),
        (lambda: KVRows(CODES, 8, SCALES[:1]), "scales"),
        (lambda: KVRows(CODES, 8, SCALES, step=32), "in steps of 32"),
        (lambda: KVRows(CODES[..., :6], 6, SCALES, is_turned=True), "not a power of two"),
    ],
)
def test_shapes_that_do_not_fit(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checks.check_rows("add", x=X.double()), "float64, not float32 or float16"),
        (lambda: checks.check_expert_matmul(X, STACK, torch.zeros((1, 4)), X[:, :6], None), "not int32"),
        (lambda: checks.check_gather(X, torch.zeros(4), X), "index is torch.float32"),
        (lambda: checks.check_chosen("route", X, X[:, :2], IDS.long()), "ids are torch.int64"),
        (lambda: Lanes(LANES.table.long(), LANES.lengths), "not int32"),
        (lambda: KVRows(ROWS.numbers.float(), 8), "float32, without scales"),
        (lambda: KVRows(ROWS.numbers, 8, SCALES), "float16, with scales"),
        (lambda: KVRows(CODES, 8, SCALES.float()), "not float16"),
    ],
)
def test_types_that_do_not_fit(call: Callable[[], None], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_sizes_of_caches() -> None:
    assert CACHE.token_bytes == 64
    assert KVBlocks(KVRows(CODES, 8, SCALES), ROWS).token_bytes == 16 + 4 + 32
    halves = torch.zeros((2, 4, 2, 16), dtype=torch.uint8)
    assert KVBlocks(ROWS, KVRows(halves, 20, SCALES, step=32)).num_bytes == 8 * (32 + 32 + 4)
