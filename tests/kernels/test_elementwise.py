"""Norms, sums and gates against float64, on every rung, for odd shapes and any number of threads."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.elementwise import (
    add_gated_row,
    add_norm_row,
    add_row,
    gate_row,
    rms_norm_row,
    scale_bias_row,
    softcap_row,
)
from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix
from tests.support.rows import ISA_NAMES, ISAS, THREADS, address, close, floats, run

EPS = 1e-5
SHAPES = [(1, 2048), (3, 1031), (5, 7), (2, 1), (33, 96)]
ACTIVATIONS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}

every_isa = pytest.mark.parametrize("isa", ISAS, ids=ISA_NAMES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normed(x: NDArray[np.float32], weight: NDArray[np.float32], offset: float = 0.0) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * (weight.astype(np.float64) + offset)


@every_isa
@every_shape
def test_rms_norm(shape: tuple[int, int], isa: ISA) -> None:
    x, weight, out = floats(0, *shape, scale=3), floats(1, shape[1]), np.zeros(shape, np.float32)
    row = rms_norm_row(Matrix.of(out), Matrix.of(x), address(weight), shape[0], eps=EPS, weight_offset=1.0, isa=isa)
    run(row)
    assert close(out, normed(x, weight, 1.0))
    assert not close(out, normed(x, weight, 1.0001)), "the tolerance would not notice a wrong offset"


@every_isa
def test_rms_norm_of_heads_in_place_with_a_stride(isa: ISA) -> None:
    block, weight = floats(0, 5, 3 * 20 + 4), floats(1, 20)
    before = block.copy()
    x = Matrix.of(block).slice(2, 60)
    run(rms_norm_row(x, x, address(weight), 5, eps=EPS, heads=3, isa=isa))
    expected = normed(before[:, 2:62].reshape(5, 3, 20), weight).reshape(5, 60)
    assert close(block[:, 2:62], expected)
    assert (block[:, :2] == before[:, :2]).all()
    assert (block[:, 62:] == before[:, 62:]).all()


@every_isa
@every_shape
@pytest.mark.parametrize("norm_delta", [False, True])
def test_add_norm(shape: tuple[int, int], isa: ISA, norm_delta: bool) -> None:
    x, delta, weight, other = floats(0, *shape), floats(1, *shape), floats(2, shape[1]), floats(3, shape[1])
    out = np.zeros(shape, np.float32)
    total = x + (normed(delta, other) if norm_delta else delta.astype(np.float64))
    row = add_norm_row(
        Matrix.of(x),
        Matrix.of(delta),
        Matrix.of(out),
        address(weight),
        shape[0],
        eps=EPS,
        delta_weight=address(other) if norm_delta else None,
        isa=isa,
    )
    run(row)
    assert close(x, total)
    assert close(out, normed(total.astype(np.float32), weight), 5e-6)


@every_isa
@every_shape
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates(shape: tuple[int, int], isa: ISA, activation: str) -> None:
    gate, up, out = floats(0, *shape, scale=4), floats(1, *shape), np.zeros(shape, np.float32)
    run(gate_row(Matrix.of(out), Matrix.of(gate), Matrix.of(up), shape[0], activation=activation, isa=isa))
    expected = ACTIVATIONS[activation](gate.astype(np.float64)) * up
    assert close(out, expected, 1e-6)
    if expected.any():
        assert not close(out, expected * (1 + 1e-5), 1e-6)


@every_isa
def test_gates_of_extreme_numbers(isa: ISA) -> None:
    gate = np.array([[-np.inf, -1e30, -200, -88, -0.0, 0.0, 88, 200, 1e30, np.inf, np.nan]], np.float32)
    up, out = np.ones_like(gate), np.zeros_like(gate)
    run(gate_row(Matrix.of(out), Matrix.of(gate), Matrix.of(up), 1, activation="silu", isa=isa))
    assert np.isnan(out[0, -1])
    assert (out[0, 4:10] == gate[0, 4:10]).all()
    assert np.abs(out[0, 2:4]).max() < 1e-30


@every_isa
@every_shape
def test_sums_factors_and_caps(shape: tuple[int, int], isa: ISA) -> None:
    x, y, gate, bias = floats(0, *shape), floats(1, *shape), floats(2, shape[0], 1), floats(3, shape[1])
    out, gated, capped = np.zeros(shape, np.float32), np.zeros(shape, np.float32), x * 40
    scaled, biased = x.copy(), x.copy()
    tokens = shape[0]
    run(
        add_row(Matrix.of(out), Matrix.of(x), Matrix.of(y), tokens, isa=isa),
        add_gated_row(Matrix.of(gated), Matrix.of(x), Matrix.of(y), Matrix.of(gate), tokens, isa=isa),
        scale_bias_row(Matrix.of(scaled), tokens, scale=0.3, isa=isa),
        scale_bias_row(Matrix.of(biased), tokens, scale=0.3, bias=address(bias), isa=isa),
        softcap_row(Matrix.of(capped), tokens, cap=30.0, isa=isa),
    )
    wide = x.astype(np.float64)
    assert (out == x + y).all()
    assert close(gated, wide + y / (1 + np.exp(-gate.astype(np.float64))))
    assert close(scaled, wide * 0.3)
    assert close(biased, wide * 0.3 + bias)
    assert close(capped, 30 * np.tanh((x * 40).astype(np.float64) / 30))


@every_isa
def test_threads_and_other_tokens_change_no_bit(isa: ISA) -> None:
    x, up, weight = floats(0, 9, 1500, scale=2), floats(1, 9, 1500), floats(2, 1500)

    def computed(tokens: slice, threads: int) -> NDArray[np.float32]:
        out = x[tokens].copy()
        run(
            rms_norm_row(Matrix.of(out), Matrix.of(out), address(weight), len(out), eps=EPS, isa=isa),
            gate_row(Matrix.of(out), Matrix.of(out), Matrix.of(up[tokens]), len(out), activation="gelu", isa=isa),
            threads=threads,
        )
        return out

    together = computed(slice(None), 1)
    for threads in THREADS:
        assert (computed(slice(None), threads) == together).all()
    for token in range(9):
        assert (computed(slice(token, token + 1), 2) == together[token]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 4), st.floats(1e-3, 1e3))
def test_rms_norm_of_any_size(columns: int, tokens: int, scale: float) -> None:
    x, weight = floats(columns, tokens, columns, scale=scale), floats(1, columns)
    out = np.zeros_like(x)
    run(rms_norm_row(Matrix.of(out), Matrix.of(x), address(weight), tokens, eps=EPS))
    assert close(out, normed(x, weight))


def test_wrong_shapes_are_refused() -> None:
    x, y = Matrix.of(floats(0, 2, 8)), Matrix.of(floats(0, 2, 9))
    with pytest.raises(ValueError, match="9 columns where there should be 8"):
        add_row(x, x, y, 2)
    with pytest.raises(ValueError, match="8 columns in 3 heads"):
        rms_norm_row(x, x, 0, 2, eps=EPS, heads=3)
    with pytest.raises(ValueError, match="'tanh' is none of"):
        gate_row(x, x, x, 2, activation="tanh")
    with pytest.raises(ValueError, match="columns 4 to 10 of 8"):
        x.slice(4, 6)
    with pytest.raises(TypeError, match="float32 rows"):
        Matrix.of(np.zeros((2, 2), np.float64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrix of 3 columns"):
        Matrix(0, 3, 2)
    assert x.rows_from(1) == Matrix(x.address + 32, 8, 8)
