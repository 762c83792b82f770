"""Reference dequantisation against the `gguf` package and, where it is installed, against GGML itself, bit for bit."""

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from cpu_kernels.quant_types import QUANT_TYPES, QuantType, quant_type, unknown_quant_type
from cpu_kernels.reference.dequantize import dequantizable, dequantize

TYPES = list(QUANT_TYPES.values())
PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
NOT_IN_PACKAGE = {"Q1_0", "Q2_0", "Q8_1", "Q8_K", *PLAIN}
# Bytes of a block at which float16 scales begin.
HALF_SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "Q1_0", "Q2_0", "IQ1_S", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
FINITE = [kind for kind in TYPES if kind.name in HALF_SCALES]


def names(kind: QuantType) -> str:
    return kind.name


def random_blocks(kind: QuantType, count: int, *, finite: bool = False) -> NDArray[np.uint8]:
    """Random bytes, (count, block_bytes); with `finite` the float16 scales are ordinary numbers of both signs."""
    rng = np.random.default_rng(kind.ggml_id)
    blocks = rng.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    for start in HALF_SCALES.get(kind.name, ()) if finite else ():
        scales = rng.normal(size=(count, 1)).astype("<f2")
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks


def assert_same_bits(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Equal bit for bit, except that any NaN equals any NaN."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))


def from_package(data: NDArray[np.uint8], kind: QuantType) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        weights: Any = quants.dequantize(data.copy(), gguf.GGMLQuantizationType(kind.ggml_id))
    return np.asarray(weights, dtype=np.float32)


def test_every_type_of_the_package_is_known() -> None:
    for member, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        kind = QUANT_TYPES[member.value]
        assert kind.name == member.name
        if kind.name != "Q8_1":  # the package counts float32 scales, GGML has had float16 ones since 2023
            assert (kind.block_size, kind.block_bytes) == (block_size, block_bytes)
        assert dequantizable(kind)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.name not in NOT_IN_PACKAGE], ids=names)
def test_any_bytes_give_what_the_package_gives(kind: QuantType) -> None:
    blocks = random_blocks(kind, 2000)
    assert_same_bits(dequantize(blocks, kind), from_package(blocks, kind))


@pytest.mark.parametrize("kind", [kind for kind in FINITE if kind.name not in NOT_IN_PACKAGE], ids=names)
def test_finite_scales_give_finite_weights_that_differ(kind: QuantType) -> None:
    blocks = random_blocks(kind, 300, finite=True)
    weights = dequantize(blocks, kind)
    assert np.isfinite(weights).all()
    assert (np.ptp(weights, axis=1) > 0).all()
    assert_same_bits(weights, from_package(blocks, kind))


@pytest.mark.parametrize(("name", "dtype"), PLAIN.items())
def test_plain_numbers_are_their_values(name: str, dtype: str) -> None:
    kind = quant_type(name)
    data = random_blocks(kind, 600).reshape(2, 3, -1)
    with np.errstate(all="ignore"):
        expected = data.view(dtype).astype(np.float32)
    assert_same_bits(dequantize(data, kind), expected)


def test_q8_1_by_its_definition() -> None:
    kind = quant_type("Q8_1")
    blocks = random_blocks(kind, 50, finite=True)
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    assert_same_bits(dequantize(blocks, kind), d * blocks[:, 4:].view(np.int8).astype(np.float32))


def test_q8_k_by_its_definition() -> None:
    kind = quant_type("Q8_K")
    blocks = random_blocks(kind, 50)
    blocks[:, :4] = np.linspace(-1, 1, 50, dtype="<f4")[:, None].view(np.uint8)
    d = blocks[:, :4].copy().view("<f4")
    assert_same_bits(dequantize(blocks, kind), d * blocks[:, 4:260].view(np.int8).astype(np.float32))


def test_q1_0_and_q2_0_by_their_definition() -> None:
    for name, bits in (("Q1_0", 1), ("Q2_0", 2)):
        kind = quant_type(name)
        blocks = random_blocks(kind, 20, finite=True)
        weights = dequantize(blocks, kind)
        for row, block in zip(weights, blocks, strict=True):
            d = np.float32(block[:2].copy().view("<f2")[0])
            for index in range(kind.block_size):
                code = int(block[2 + index * bits // 8]) >> (index * bits % 8) & (1 << bits) - 1
                assert row[index] == (d * np.float32(2 * code - 1) if bits == 1 else d * np.float32(code - 1))


@pytest.mark.parametrize("kind", TYPES, ids=names)
def test_shapes_are_kept_and_rows_stand_alone(kind: QuantType) -> None:
    blocks = random_blocks(kind, 24)
    for shape in ((24, 1), (2, 3, 4), (1, 24), (0, 1), (3, 0)):
        data = blocks[: shape[0] * shape[-1]] if 0 in shape else blocks
        data = data.reshape(*shape[:-1], shape[-1] * kind.block_bytes)
        weights = dequantize(data, kind)
        assert weights.shape == (*shape[:-1], shape[-1] * kind.block_size)
        assert weights.flags.c_contiguous
    whole = dequantize(blocks, kind)
    assert_same_bits(dequantize(blocks[7:9], kind), whole[7:9])
    assert_same_bits(dequantize(blocks[::2], kind), whole[::2])


def test_many_blocks_cross_the_chunks() -> None:
    for name in ("Q4_0", "Q6_K", "IQ3_S"):
        kind = quant_type(name)
        blocks = random_blocks(kind, 3 * 65536 // kind.block_size + 5)
        pieces = [dequantize(blocks[first : first + 100], kind) for first in range(0, len(blocks), 100)]
        assert_same_bits(dequantize(blocks, kind), np.concatenate(pieces))


def test_the_result_is_a_copy() -> None:
    data = np.zeros(16, dtype=np.uint8)
    weights = dequantize(data, quant_type("F32"))
    data[:] = 1
    assert not weights.any()


def test_bad_scales_show_in_the_weights() -> None:
    blocks = random_blocks(quant_type("Q4_0"), 2, finite=True)
    blocks[1, :2] = np.array([np.nan], dtype="<f2").view(np.uint8)
    weights = dequantize(blocks, quant_type("Q4_0"))
    assert np.isfinite(weights[0]).all()
    assert np.isnan(weights[1]).all()


def test_what_cannot_be_decoded_is_refused() -> None:
    kind = quant_type("Q4_0")
    with pytest.raises(ValueError, match="not whole Q4_0 blocks of 18 bytes"):
        dequantize(np.zeros((2, 17), dtype=np.uint8), kind)
    with pytest.raises(ValueError, match="not whole"):
        dequantize(np.array(0, dtype=np.uint8), kind)
    with pytest.raises(TypeError, match="not int8"):
        dequantize(np.zeros(18, dtype=np.int8), kind)
    unknown = unknown_quant_type(42_000)
    assert not dequantizable(unknown)
    with pytest.raises(NotImplementedError, match="type 42000"):
        dequantize(np.zeros(18, dtype=np.uint8), unknown)


class TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    peer = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    found = sorted((Path(peer.__file__).parent / "lib").glob("*ggml-base.*"))
    if not found:
        pytest.skip("this llama-cpp-python has no ggml-base library of its own")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


@pytest.mark.peer
@pytest.mark.parametrize("kind", TYPES, ids=names)
def test_any_bytes_give_what_ggml_gives(kind: QuantType, ggml: ctypes.CDLL) -> None:
    traits = ggml.ggml_get_type_traits(kind.ggml_id).contents
    assert (traits.block_size, traits.type_size) == (kind.block_size, kind.block_bytes)
    to_float = traits.to_float
    if kind.name == "Q8_K":  # exported, but not in the table
        to_float = ctypes.cast(ggml.dequantize_row_q8_K, ctypes.c_void_p).value
    if not to_float:
        pytest.skip(f"GGML cannot decode {kind.name} itself")
    blocks = random_blocks(kind, 2000)
    expected = np.empty((len(blocks), kind.block_size), dtype=np.float32)
    decode = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(to_float)
    decode(blocks.ctypes.data, expected.ctypes.data, expected.size)
    assert_same_bits(dequantize(blocks, kind), expected)
