"""Which layers' chunks go to flash together, and in which order."""

from cpu_kernels.kv_policy import KVPolicy
from runtime.executor.program.kv_groups import LayerGroup, first_seen, in_order, layer_groups
from runtime.executor.program.sequence_layout import sequence_layout


def groups(budget: int | None, windows: list[int | None]) -> tuple[LayerGroup, ...]:
    return layer_groups(sequence_layout(KVPolicy(budget_tokens=budget), 4, 2, 32, 32, 4096), windows)


def order(found: tuple[LayerGroup, ...], tokens: int) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (piece, group.layers)
        for piece, group in in_order(found, [0] * len(found), [tokens // 512] * len(found), tokens)
    ]


def test_without_a_budget_all_layers_go_together() -> None:
    assert groups(None, [None] * 4) == (LayerGroup((0, 1, 2, 3)),)
    assert order(groups(None, []), 1100) == [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3))]


def test_layers_that_are_read_whole_go_last() -> None:
    found = groups(256, [])
    assert order(found, 1024) == [(0, (2,)), (0, (3,)), (1, (2,)), (1, (3,)), (0, (0, 1)), (1, (0, 1))]
    assert next(in_order(found, [2, 1, 0], [2, 2, 2], 1024)) == (1, LayerGroup((3,), is_chosen=True))
    assert not list(in_order(found, [3, 3, 3], [2, 2, 2], 1024))


def test_windows_stay_as_far_as_they_see() -> None:
    found = groups(256, [None, None, 600, None])
    assert order(found, 2048) == [
        *((0, (3,)), (0, (2,)), (1, (3,)), (1, (2,)), (2, (3,)), (3, (3,))),
        *((0, (0, 1)), (1, (0, 1)), (2, (0, 1)), (2, (2,)), (3, (0, 1)), (3, (2,))),
    ]
    assert [first_seen(600, start) for start in (0, 599, 1110, 1111)] == [0, 0, 0, 1]
    assert first_seen(None, 5000) == 0
