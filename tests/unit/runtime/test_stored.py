"""Bundles from a store: what reads bring into slots, and what happens where the store is damaged."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.isa import current
from offload.errors import StrataError
from offload.expert_load import Piece
from offload.flash import FlashReader, ReadMode
from offload.gguf import GGUFFile
from offload.store import Store
from runtime import model_store
from runtime.architectures import describe
from runtime.model_store import build_store, plan_store
from runtime.packing import BundlePacker
from runtime.stored import StoredBundles
from tests.support import models


@contextmanager
def stored(
    tmp_path: Path, name: str = "mixtral", damage: Callable[[Store], None] | None = None
) -> Iterator[tuple[StoredBundles, dict[tuple[int, int], bytes]]]:
    """A model's store, damaged if wanted, and what every slot must hold."""
    path = models.write_model(tmp_path / "model.gguf", models.FAMILIES[name], "Q8_0")
    with GGUFFile.open(path) as gguf:
        plan = plan_store(gguf, describe(gguf), tmp_path / "stores")
        build_store(gguf, plan, threads=2)
        packer = BundlePacker(gguf, current())
        expected: dict[tuple[int, int], bytes] = {}
        for piece in plan.pieces:
            owner = piece.bundle.layer, piece.bundle.expert or 0
            packed = packer.pack(piece.bundle, packer.read(piece.bundle))
            expected[owner] = expected.get(owner, b"") + piece.of(packed).tobytes()
        if damage is not None:
            with Store.open(plan.folder) as store:
                damage(store)
        with StoredBundles(Store.open(plan.folder, plan.key), plan, packer) as bundles:
            yield bundles, expected


def slot_of(bundles: StoredBundles, layer: int, expert: int, num_bytes: int) -> NDArray[np.uint8]:
    """Reads an expert as the cache does."""
    slot = np.zeros(num_bytes, np.uint8)
    pieces = bundles.pieces(layer, expert)
    failures: list[StrataError] = []
    landed = threading.Semaphore(0)

    def failed(error: StrataError) -> None:
        failures.append(error)
        landed.release()

    with FlashReader(bundles.sources, most_bytes=bundles.most_bytes, mode=ReadMode.DIRECT, depth=2) as reader:
        for piece in pieces:

            def consume(data: NDArray[np.uint8], piece: Piece = piece) -> None:
                piece.unpack(data, slot)
                landed.release()

            reader.submit(piece.extent, consume, failed)
        for _ in pieces:
            assert landed.acquire(timeout=20)
    assert failures == []
    return slot


@pytest.mark.parametrize(("name", "parts"), [("mixtral", 2), ("llama", 4)])
@pytest.mark.parametrize("piece_bytes", [model_store.PIECE_BYTES, 30_000])
def test_slots_hold_the_parts_one_behind_the_other(
    tmp_path: Path, name: str, parts: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store, "PIECE_BYTES", piece_bytes)
    with stored(tmp_path, name) as (bundles, expected):
        for (layer, expert), whole in expected.items():
            order = [piece.part for piece in bundles.pieces(layer, expert)]
            assert sorted(order) == order
            assert set(order) == set(range(parts))
            assert slot_of(bundles, layer, expert, len(whole)).tobytes() == whole


def test_what_is_damaged_is_packed_from_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def damage(store: Store) -> None:
        with store.path.open("r+b") as file:
            file.seek(store.place(3).offset + 1000)
            file.write(b"damage")

    with stored(tmp_path, damage=damage) as (bundles, expected):
        for (layer, expert), whole in expected.items():
            assert slot_of(bundles, layer, expert, len(whole)).tobytes() == whole
    assert "bundle blk.0.ffn_down_exps.1 is damaged: packed from the model instead" in caplog.text
