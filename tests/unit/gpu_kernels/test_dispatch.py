"""Which way products take, and what programs of kernels take at a time."""

from typing import ClassVar

import pytest
import torch

from gpu_kernels.decoding import DECODINGS
from gpu_kernels.dispatch import (
    BUCKETS,
    STEP_SAMPLES,
    Dispatch,
    Measured,
    ProductShape,
    dispatch_of,
    kernels_for,
    measured_ways,
    weightiest,
)
from gpu_kernels.layouts import layout
from gpu_kernels.tiles import STEP_COLUMNS, GpuTraits, attention_tile, few_columns_tile, many_columns_tile
from gpu_kernels.torch_kernels import TorchKernels
from gpu_kernels.triton_kernels import TritonKernels

AMPERE, TURING = GpuTraits(20, 86), GpuTraits(16, 75)


def test_decodings_cover_the_blocks() -> None:
    for name, decoding in DECODINGS.items():
        if decoding.block_groups:
            assert decoding.block_groups * decoding.units * decoding.parts == layout(name).block_size


def test_a_generation_chooses_by_columns() -> None:
    assert [Dispatch(AMPERE).way("Q4_0", tokens) for tokens in (1, 4, 32, 33, 64, 65, 4000)] == [
        *("few", "few", "few", "many", "many", "decoded", "decoded")
    ]
    assert Dispatch(TURING).way("Q4_0", 33) == "decoded"
    assert Dispatch(AMPERE).way("IQ1_S", 1) == "torch"


def test_measurements_choose_the_fastest_way_that_makes_sense() -> None:
    asked = []

    def seconds(shape: ProductShape, tokens: int, way: str) -> float:
        asked.append((tokens, way))
        return {"few": tokens, "many": 7.5, "decoded": 0.01 * tokens + 6.6}[way]

    shapes = weightiest(
        [ProductShape("Q4_0", 64, 64), *[ProductShape("Q4_0", 64, 32)] * 3, ProductShape("IQ1_S", 9, 9)]
    )
    assert shapes == [ProductShape("Q4_0", 64, 32)]
    ways = measured_ways(shapes, seconds, {})
    dispatch = dispatch_of(AMPERE, shapes, ways)
    assert [dispatch.way("Q4_0", bucket) for bucket in BUCKETS] == ["few", "decoded", "many", "many", "many"]
    assert {tokens for tokens, way in asked if way == "few"} == set(STEP_SAMPLES)
    assert dispatch.way("Q8_0", 1) == "few"
    assert dispatch.describe("Q4_0") == "Q4_0 (measured) 32: few, 64: decoded, 128: many, 256: many, 512: many"
    assert dispatch.describe("Q8_0").startswith("Q8_0 (sm_86) 32: few")
    asked.clear()
    assert measured_ways(shapes, seconds, ways) == ways
    assert not asked
    with pytest.raises(ValueError, match="slow"):
        dispatch_of(AMPERE, shapes, {**ways, shapes[0].key(64): "slow"})


def test_a_step_is_computed_in_one_way_however_many_columns_it_has() -> None:
    """Where verifying drafts is much quicker so, single tokens are multiplied as slowly."""

    def seconds(_shape: ProductShape, tokens: int, way: str) -> float:
        return 1.0 if way == "many" else 0.6 * tokens

    shape = ProductShape("Q8_0", 64, 64)
    dispatch = dispatch_of(AMPERE, [shape], measured_ways([shape], seconds, {}))
    assert {dispatch.way("Q8_0", tokens) for tokens in range(1, STEP_COLUMNS + 1)} == {"many"}


def test_the_cpu_and_simulated_gpus_use_torch() -> None:
    assert isinstance(kernels_for("cpu"), TorchKernels)
    assert isinstance(kernels_for("cuda:0", is_simulated=True), TorchKernels)


class FakeTimes:
    """Every way takes as long as its name is; writes down what was asked."""

    asked: ClassVar[list[tuple[object, ...]]] = []
    is_full = False

    def __init__(self, device: torch.device, gpu: GpuTraits) -> None:
        self.rows = self.columns = 0

    def seconds(self, quant_type: str, tokens: int, way: str) -> float:
        if self.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.asked.append((quant_type, self.rows, self.columns, tokens, way))
        return float(len(way))

    def forget(self) -> None:
        """Nothing is kept."""


def test_a_models_products_are_measured_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("gpu_kernels.product_times.ProductTimes", FakeTimes)
    monkeypatch.setattr("gpu_kernels.triton_kernels.traits_of", lambda _: AMPERE)
    monkeypatch.setattr(FakeTimes, "asked", [])
    measured = Measured([ProductShape("Q4_0", 64, 32)], {})
    kernels = kernels_for("cuda:0", measured=measured)
    assert isinstance(kernels, TritonKernels)
    assert kernels.dispatch.way("Q4_0", 1) == "few"
    assert kernels.dispatch.way("Q4_0", 500) == "many"
    assert ("Q4_0", 64, 32, 8, "few") in FakeTimes.asked
    FakeTimes.asked.clear()
    again = kernels_for("cuda:0", measured=Measured(measured.shapes, dict(measured.ways)))
    assert isinstance(again, TritonKernels)
    assert again.dispatch == kernels.dispatch
    assert not FakeTimes.asked
    monkeypatch.setattr(FakeTimes, "is_full", True)
    unmeasured = kernels_for("cuda:0", measured=Measured(measured.shapes, {}))
    assert isinstance(unmeasured, TritonKernels)
    assert unmeasured.dispatch == Dispatch(AMPERE)
    assert "too little memory" in caplog.text


def test_without_triton_torch_is_used_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gpu_kernels.dispatch.util.find_spec", lambda _: None)
    assert isinstance(kernels_for("cuda:0"), TorchKernels)
    assert "Triton is not installed" in caplog.text


@pytest.mark.parametrize("name", DECODINGS)
def test_programs_fill_the_gpu(name: str) -> None:
    decoding = DECODINGS[name]
    small, large = (few_columns_tile(decoding, 1, rows, 2048, AMPERE) for rows in (64, 1 << 16))
    assert small.rows == 4 <= large.rows
    assert few_columns_tile(decoding, 300, 4096, 2048, AMPERE).columns == 4
    split = many_columns_tile(decoding, 16, 512, 8192, AMPERE, is_float32=False)
    assert split.splits > 1
    groups = decoding.groups(8192)
    each = split.split_groups(groups)
    assert each % split.groups == 0
    assert each * split.splits >= groups
    assert many_columns_tile(decoding, 64, 1 << 16, 2048, AMPERE, is_float32=False).splits == 1
    assert many_columns_tile(decoding, 64, 512, 8192, AMPERE, is_float32=True).columns == 16


@pytest.mark.parametrize("name", DECODINGS)
@pytest.mark.parametrize("rows", [64, 768, 1 << 16])
def test_sums_of_a_step_are_split_alike_however_many_columns_it_has(name: str, rows: int) -> None:
    shape, decoding = (rows, 4096, AMPERE), DECODINGS[name]
    few = {few_columns_tile(decoding, tokens, *shape) for tokens in range(1, STEP_COLUMNS + 1)}
    assert len({(tile.rows, tile.groups, tile.warps, tile.splits) for tile in few}) == 1
    for is_float32 in (False, True):
        tiles = (many_columns_tile(decoding, n, *shape, is_float32=is_float32) for n in range(1, STEP_COLUMNS + 1))
        assert len(set(tiles)) == 1


def test_long_contexts_are_shared() -> None:
    steps = {attention_tile(4, tokens, 1 << 15, 128, is_float32=False) for tokens in range(1, STEP_COLUMNS + 1)}
    assert [tile.splits for tile in steps] == [128]
    assert attention_tile(4, 1, 100, 128, is_float32=False).splits == 1
    prefill = attention_tile(4, 512, 1 << 15, 128, is_float32=False)
    assert (prefill.rows, prefill.splits) == (64, 1)
    assert attention_tile(4, 512, 1 << 15, 256, is_float32=False).rows == 16
