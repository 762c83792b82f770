"""How much memory chunks on flash are read to."""

import pytest

from offload import kv_chunks
from offload.kv_chunks import RING_BYTES, RING_SLOTS, ring_slots, staging_slots

SIZE = RING_BYTES // 20


@pytest.mark.parametrize(("layers", "pieces", "slots"), [(16, 0, 0), (16, 3, 6), (2, 3, 3), (16, 240, 20)])
def test_a_ring_is_bounded(layers: int, pieces: int, slots: int) -> None:
    assert ring_slots(layers, SIZE, pieces) == slots
    assert staging_slots(layers, SIZE, pieces) == slots
    assert ring_slots(layers, RING_BYTES, pieces) == min(slots, RING_SLOTS)


def test_what_is_chosen_has_room_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_chunks, "RING_BYTES", 8 * SIZE)
    assert staging_slots(16, SIZE, 2, 30) == 30 + 4
    assert staging_slots(16, SIZE, 9, 30) == 30 + 8
    assert staging_slots(16, SIZE, 0, 3) == 6, "that of a prompt"
    assert staging_slots(16, SIZE, 0, 30) == 31
