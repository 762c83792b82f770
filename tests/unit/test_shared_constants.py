"""Sizes that the planner counts with are those the executor has; imports may not go upwards."""

import pytest

from cpu_kernels.formats import has_panel_format, panel_format
from cpu_kernels.isa import current
from cpu_kernels.quant_types import QUANT_TYPES
from planner import memory
from runtime import weights
from runtime.executor import layers
from runtime.executor.program import executor, runner


def test_the_planner_counts_with_the_executors_sizes():
    assert memory.UNIT_WEIGHTS == weights.UNIT_WEIGHTS
    assert memory.ATTENTION_SCORES == layers.SCORES_IN_MEMORY
    assert memory.PROGRAM_CHUNK_TOKENS == executor.CHUNK_TOKENS
    assert memory.PROGRAM_LOGITS_TOKENS == runner.LOGITS_TOKENS


@pytest.mark.parametrize(
    "kind", [kind for kind in QUANT_TYPES.values() if has_panel_format(kind)], ids=lambda kind: kind.name
)
def test_panels_take_the_bytes_that_the_planner_counts(kind):
    panels = panel_format(kind, current())
    bits = 8 * panels.panel_bytes(panels.group_rows * 8, 2048) / (panels.group_rows * 8 * 2048)
    assert bits <= memory.PACKED_BITS.get(kind.name, kind.bits_per_weight) * 1.001
