"""Triton's products in its interpreter against torch's, on odd shapes, for every quant type it decodes."""

import pytest
import torch

from gpu_kernels.decoding import DECODINGS
from gpu_kernels.dequantize import dequantize
from gpu_kernels.dispatch import BUCKETS, Dispatch
from gpu_kernels.matrix import GpuMatrix, arrange
from gpu_kernels.tiles import GpuTraits
from gpu_kernels.torch_kernels import TorchKernels
from gpu_kernels.triton_kernels import TritonKernels
from gpu_kernels.triton_matmul import decode
from tests.support.gpu_matrices import assert_close, normal, raw_rows
from tests.support.gpu_steps import segments_of

TORCH = TorchKernels()
HALF = 1e-3  # of the greatest: products of numbers rounded to float16
EXACT = 2e-6


def columns_of(name: str) -> int:
    """Two blocks of 256; for floats a row that fills no tile."""
    return 512 if DECODINGS[name].block_groups else 75


def matrix_of(name: str, *leading: int) -> GpuMatrix:
    return arrange(torch.from_numpy(raw_rows(name, *leading, columns_of(name))), name)


def kernels(way: str, *, capability: int = 80, exact: bool = False, processors: int = 1) -> TritonKernels:
    """Kernels that compute all products in one way."""
    table = {(name, bucket): way for name in DECODINGS for bucket in BUCKETS}
    return TritonKernels(Dispatch(GpuTraits(processors, capability), table), is_exact=exact)


@pytest.mark.parametrize("name", DECODINGS)
def test_weights_are_the_reference_to_the_bit(name: str) -> None:
    matrix = matrix_of(name, 5)
    out = torch.empty((5, matrix.columns))
    decode(matrix, out)
    assert torch.equal(out.view(torch.int32), dequantize(matrix).view(torch.int32))


@pytest.mark.parametrize("name", DECODINGS)
def test_products_of_one_column_and_some(name: str) -> None:
    """One column by the kernel of few; three by that of many, which decodes to float16."""
    matrix = matrix_of(name, 9)
    x = normal(1, 3, matrix.columns)
    wanted, out = torch.empty((3, 9)), torch.full((3, 9), torch.nan)
    TORCH.matmul(x, matrix, wanted)
    kernels("few").matmul(x[:1], matrix, out[:1])
    assert_close(out[:1], wanted[:1], EXACT)
    kernels("many").matmul(x, matrix, out)
    assert_close(out, wanted, EXACT if name == "F32" else HALF)


@pytest.mark.parametrize("way", ["few", "many", "decoded"])
@pytest.mark.parametrize("exact", [False, True])
def test_products_scale_add_and_read_slices(way: str, exact: bool) -> None:
    matrix = matrix_of("Q4_K", 21)
    wide, bias, before = normal(2, 5, 520) * 1e4, normal(3, 21), normal(4, 5, 24)
    x = wide[:, 8:]
    found, wanted = before.clone(), before.clone()
    TORCH.matmul(x, matrix, wanted[:, 1:22], adds=True, scale=0.5, bias=bias)
    kernels(way, exact=exact).matmul(x, matrix, found[:, 1:22], adds=True, scale=0.5, bias=bias)
    assert_close(found, wanted, EXACT if exact or way == "few" else HALF)
    assert torch.equal(found[:, 0], before[:, 0])


def test_rows_shared_by_programs_are_summed() -> None:
    matrix = arrange(torch.from_numpy(raw_rows("Q8_0", 6, 2048)), "Q8_0")
    x, bias, before = normal(5, 2, 2048), normal(6, 6), normal(7, 2, 6)
    found, wanted = before.clone(), before.clone()
    TORCH.matmul(x, matrix, wanted, adds=True, bias=bias)
    kernels("many", processors=3).matmul(x, matrix, found, adds=True, bias=bias)
    assert_close(found, wanted, HALF)


def test_gpus_without_matrix_units_multiply_float32() -> None:
    matrix = matrix_of("Q6_K", 7)
    x, wanted, out = normal(8, 6, 512), torch.empty((6, 7)), torch.empty((6, 7))
    TORCH.matmul(x, matrix, wanted)
    kernels("many", capability=61).matmul(x, matrix, out)
    assert_close(out, wanted, EXACT)


def test_half_activations() -> None:
    matrix = matrix_of("Q5_1", 7)
    x, wanted, out = normal(8, 2, 512).half(), torch.empty((2, 7)).half(), torch.empty((2, 7)).half()
    TORCH.matmul(x, matrix, wanted)
    for way in ("few", "many"):
        kernels(way).matmul(x, matrix, out)
        assert_close(out, wanted, HALF)


def test_types_without_a_kernel_are_torchs() -> None:
    matrix = arrange(torch.from_numpy(raw_rows("IQ2_S", 3, 256)), "IQ2_S")
    x, wanted, out = normal(9, 2, 256), torch.empty((2, 3)), torch.empty((2, 3))
    TORCH.matmul(x, matrix, wanted)
    chosen = TritonKernels(Dispatch(GpuTraits(1, 80)))
    assert chosen.dispatch.way("IQ2_S", 2) == "torch"
    chosen.matmul(x, matrix, out)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K", "Q5_K", "MXFP4", "F16", "IQ3_S"])
@pytest.mark.parametrize("counts", [[(2, 1), (0, 1)], [(1, 3), (3, 2), (0, 1)], [(1, 40), (2, 17), (0, 8)]])
def test_products_of_experts(name: str, counts: list[tuple[int, int]]) -> None:
    columns = columns_of(name) if name in DECODINGS else 256
    matrix = arrange(torch.from_numpy(raw_rows(name, 4, 5, columns)), name)
    pairs = sum(count for _, count in counts) + 1
    x, scales = normal(10, pairs, columns), normal(11, 5)
    wanted, out = torch.full((pairs, 5), 7.0), torch.full((pairs, 5), 7.0)
    segments = segments_of(counts)
    TORCH.expert_matmul(x, matrix, segments, wanted, scales=scales)
    TritonKernels(Dispatch(GpuTraits(1, 80))).expert_matmul(x, matrix, segments, out, scales=scales)
    assert_close(out, wanted, EXACT if pairs <= 64 else HALF)
