"""Sizes that the planner counts with are those the executor has; imports may not go upwards."""

from planner import memory
from runtime import weights
from runtime.executor import layers


def test_the_planner_counts_with_the_executors_sizes():
    assert memory.UNIT_WEIGHTS == weights.UNIT_WEIGHTS
    assert memory.ATTENTION_SCORES == layers.SCORES_IN_MEMORY
