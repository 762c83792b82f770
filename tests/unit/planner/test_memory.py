"""Bytes a plan needs: they grow with what is asked, and bound what the executor holds."""

from hypothesis import given
from hypothesis import strategies as st

from offload.tiers import Device
from planner.budget import GIB, MIB, Budget
from planner.memory import activations_bytes, buffers_bytes, memory_needs, weights_bytes
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
