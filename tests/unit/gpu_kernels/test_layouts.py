"""The fields of quant blocks cover them, and sizes are those of the quant types."""

import pytest

from cpu_kernels.quant_types import QUANT_TYPES, quant_type
from gpu_kernels.layouts import LAYOUTS, layout

WHOLE_NUMBERS = {"F64", "I8", "I16", "I32", "I64"}
FOR_ACTIVATIONS = {"Q8_1", "Q8_K"}


def test_every_type_of_weights_has_a_layout() -> None:
    weights = {kind.name for kind in QUANT_TYPES.values()} - WHOLE_NUMBERS - FOR_ACTIVATIONS
    assert set(LAYOUTS) == weights


@pytest.mark.parametrize("name", LAYOUTS)
def test_fields_cover_a_block_of_the_right_size(name: str) -> None:
    block, kind = layout(name), quant_type(name)
    assert (block.quant_type, block.block_size, block.block_bytes) == (name, kind.block_size, kind.block_bytes)
    end = 0
    for field in block.fields:
        assert field.offset == end
        end += field.num_bytes
    assert end == block.block_bytes
    assert block.row_bytes(3 * block.block_size) == 3 * block.block_bytes


def test_cut_blocks_and_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="33 columns are not a multiple of the 32 weights of a Q4_0 block"):
        layout("Q4_0").row_bytes(33)
    with pytest.raises(NotImplementedError, match="I32 matrices on a GPU"):
        layout("I32")
