"""Bytes a plan needs: they grow with what is asked, and bound what the executor holds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.tiers import Device
from planner.budget import GIB, MIB, Budget
from planner.memory import (
    VOCABULARY_BYTES_PER_MERGE,
    activations_bytes,
    buffers_bytes,
    memory_needs,
    vocabulary_bytes,
    weights_bytes,
)
from planner.model_shape import ModelShape
from planner.plan import WeightsForm
from tests.support.planning import header, llama_8b

BUDGET = Budget(64 * GIB, 0, "test", "no GPU", ram_margin_bytes=GIB)


def test_weights_by_form() -> None:
    shape = ModelShape.from_gguf(header(weights="Q8_0"))
    assert weights_bytes(shape, WeightsForm.FLOAT32) == 4 * shape.num_parameters
    assert weights_bytes(shape, WeightsForm.QUANTISED) == shape.num_bytes < shape.num_parameters * 1.2


def test_scores_are_bounded_but_never_below_one_row() -> None:
    shape = ModelShape.from_gguf(llama_8b())
    assert activations_bytes(shape, 1 << 17, 512) - activations_bytes(shape, 1 << 16, 512) < 600 * MIB
    assert activations_bytes(shape, 1 << 17, 1) >= 4 * 32 * (1 << 17)


def test_a_gpu_gets_the_largest_tensor_through_ram() -> None:
    shape = ModelShape.from_gguf(llama_8b())
    whole = buffers_bytes(shape, Device.GPU) - buffers_bytes(shape, Device.CPU)
    assert whole == 4 * 4096 * 128256


@given(context=st.integers(1, 1 << 17), chunk=st.integers(1, 512), form=st.sampled_from(list(WeightsForm)))
def test_needs_grow_with_context_and_chunk(context: int, chunk: int, form: WeightsForm) -> None:
    shape = ModelShape.from_gguf(llama_8b())

    def needed(context: int, chunk: int) -> int:
        return memory_needs(
            shape, BUDGET, Device.CPU, form, context_tokens=context, chunk_tokens=chunk
        ).ram.needed_bytes

    assert needed(context, chunk) <= needed(context + 1, chunk) < needed(context + 8192, chunk)
    assert needed(context, chunk) <= needed(context, chunk + 1)


# (tokens, merges, bytes held once built, at the peak), beyond those of 256 tokens; the named ones are llama.cpp's.
MEASURED_VOCABULARIES = [
    (32_000, 0, 5_300_000, 5_300_000),  # llama-spm
    (32_256, 31_757, 23_600_000, 25_800_000),  # deepseek-coder
    (50_257, 50_000, 27_300_000, 35_300_000),  # gpt-2
    (102_400, 99_757, 55_000_000, 75_400_000),  # deepseek-llm
    (128_256, 280_147, 102_900_000, 171_100_000),  # llama-bpe
    (151_936, 151_387, 87_100_000, 120_500_000),  # qwen2
    (256_000, 0, 97_700_000, 97_600_000),  # generated
    (256_000, 563_200, 171_700_000, 289_100_000),
]


@pytest.mark.parametrize(("tokens", "merges", "held", "peak"), MEASURED_VOCABULARIES)
def test_vocabularies_take_no_more_than_planned(tokens: int, merges: int, held: int, peak: int) -> None:
    shape = replace(ModelShape.from_gguf(header()), vocab_size=tokens, merge_count=merges)
    assert vocabulary_bytes(shape, 1 << 40) >= held
    assert vocabulary_bytes(shape, 0) >= peak


def test_merges_cost_and_a_vocabulary_without_them_does_not() -> None:
    shape = ModelShape.from_gguf(header(vocab=50_000))
    assert shape.merge_count == 0
    merged = replace(shape, merge_count=100_000)
    assert vocabulary_bytes(merged, 1 << 40) - vocabulary_bytes(shape, 1 << 40) == 100_000 * VOCABULARY_BYTES_PER_MERGE
    needs = [
        memory_needs(one, BUDGET, Device.CPU, WeightsForm.PACKED, context_tokens=64, chunk_tokens=64).ram.peak_bytes
        for one in (shape, merged)
    ]
    assert needs[0] < needs[1]
