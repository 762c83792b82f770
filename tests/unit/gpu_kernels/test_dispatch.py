"""Which way products take, and what programs of kernels take at a time."""

import pytest

from gpu_kernels.decoding import DECODINGS
from gpu_kernels.dispatch import BUCKETS, Dispatch, kernels_for, measured_dispatch
from gpu_kernels.layouts import layout
from gpu_kernels.tiles import GpuTraits, attention_tile, few_columns_tile, many_columns_tile
from gpu_kernels.torch_kernels import TorchKernels

AMPERE, TURING = GpuTraits(20, 86), GpuTraits(16, 75)


def test_decodings_cover_the_blocks() -> None:
    for name, decoding in DECODINGS.items():
        if decoding.block_groups:
            assert decoding.block_groups * decoding.units * decoding.parts == layout(name).block_size


def test_a_generation_chooses_by_columns() -> None:
    assert [Dispatch(AMPERE).way("Q4_0", tokens) for tokens in (1, 4, 5, 64, 65, 4000)] == [
        *("few", "few", "many", "many", "decoded", "decoded")
    ]
    assert Dispatch(TURING).way("Q4_0", 17) == "decoded"
    assert Dispatch(AMPERE).way("IQ1_S", 1) == "torch"


def test_measurements_choose_the_fastest_way_that_makes_sense() -> None:
    asked = []

    def seconds(quant_type: str, tokens: int, way: str) -> float:
        asked.append((tokens, way))
        return {"few": tokens, "many": 7.5, "decoded": 0.1 * tokens + 4}[way]

    dispatch = measured_dispatch(AMPERE, ["Q4_0", "IQ1_S"], seconds)
    ways = [dispatch.way("Q4_0", bucket) for bucket in BUCKETS]
    assert ways == ["few"] * 3 + ["many"] + ["decoded"] * 2 + ["many"] * 4
    assert (1, "many") not in asked
    assert (64, "few") not in asked
    assert dispatch.way("Q8_0", 1) == "few"
    assert dispatch.describe("Q4_0").startswith("Q4_0 (measured) 1: few, 2: few, 4: few, 8: many")
    assert dispatch.describe("Q8_0").startswith("Q8_0 (sm_86) 1: few")


def test_the_cpu_and_simulated_gpus_use_torch() -> None:
    assert isinstance(kernels_for("cpu"), TorchKernels)
    assert isinstance(kernels_for("cuda:0", is_simulated=True), TorchKernels)


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


def test_long_contexts_are_shared() -> None:
    decode = attention_tile(4, 8, 1 << 15, 128, AMPERE, is_float32=False)
    assert decode.splits == 5
    assert attention_tile(4, 8, 100, 128, AMPERE, is_float32=False).splits == 1
    prefill = attention_tile(2048, 8, 1 << 15, 128, AMPERE, is_float32=False)
    assert (prefill.rows, prefill.splits) == (64, 1)
    assert attention_tile(2048, 8, 1 << 15, 256, AMPERE, is_float32=False).rows == 16
