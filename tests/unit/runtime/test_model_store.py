"""Building a model's store."""

from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.isa import current
from offload import gguf_source, store_writer
from offload.errors import FlashError, ModelFormatError
from offload.gguf import GGUFFile
from offload.store import Store
from runtime import model_store
from runtime.architectures import describe
from runtime.model_store import StorePlan, build_store, plan_store
from runtime.packing import BundlePacker
from tests.support import models


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "model.gguf", models.FAMILIES["mixtral"], "Q8_0")


def planned(gguf: GGUFFile, tmp_path: Path) -> StorePlan:
    return plan_store(gguf, describe(gguf), tmp_path / "stores")


@pytest.mark.parametrize(("threads", "piece_bytes"), [(1, model_store.PIECE_BYTES), (3, 50_000)])
def test_a_store_holds_every_bundle(
    path: Path, tmp_path: Path, threads: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store, "AHEAD_BYTES", 200_000)
    monkeypatch.setattr(model_store, "PIECE_BYTES", piece_bytes)
    heard: list[tuple[int, int]] = []
    with GGUFFile.open(path) as gguf:
        plan = planned(gguf, tmp_path)
        build_store(gguf, plan, threads=threads, progress=lambda *counts: heard.append(counts))
        packer = BundlePacker(gguf, current())
        with Store.open(plan.folder, plan.key) as store:
            assert store.verify() == ()
            for index, piece in enumerate(plan.pieces):
                data = np.empty(piece.num_bytes, np.uint8)
                store.read_into(index, data)
                assert store.index(piece.name) == index
                np.testing.assert_array_equal(data, piece.of(packer.pack(piece.bundle, packer.read(piece.bundle))))
    assert len(heard) == len(plan.pieces)
    assert heard[-1] == (plan.num_bytes, plan.num_bytes)
    assert plan.folder.parent == tmp_path / "stores"
    assert plan.folder.name.startswith("model-")


def test_large_bundles_are_cut_into_pieces(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "PIECE_BYTES", 100_000)
    with GGUFFile.open(path) as gguf:
        pieces = planned(gguf, tmp_path).pieces
    assert [piece.name for piece in pieces[:3]] == [
        "blk.0.ffn_gate_exps+ffn_up_exps.0",
        "blk.0.ffn_gate_exps+ffn_up_exps.0@100000",
        "blk.0.ffn_down_exps.0",
    ]
    assert [piece.num_bytes for piece in pieces[:3]] == [100_000, 139_264 - 100_000, 69_632]


def test_the_same_file_has_the_same_store(path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(path) as gguf:
        assert planned(gguf, tmp_path).folder == planned(gguf, tmp_path).folder


@pytest.mark.parametrize("last", [1, 2, 20, 36])
def test_a_build_goes_on_after_a_failed_read(
    path: Path, tmp_path: Path, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "BATCH_BYTES", 200_000)
    monkeypatch.setattr(model_store, "AHEAD_BYTES", 200_000)
    read, calls = gguf_source.positional_read, [0]

    def failing(descriptor: int, destination: memoryview, offset: int) -> int:
        calls[0] += 1
        if calls[0] >= last:
            raise OSError(6, "injected")
        return read(descriptor, destination, offset)

    with GGUFFile.open(path) as gguf:
        plan = planned(gguf, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(gguf_source, "positional_read", failing)
            with pytest.raises(FlashError, match=r"model.gguf: reading at byte \d+ failed"):
                build_store(gguf, plan, threads=2)
        assert not plan.folder.exists()
        heard: list[int] = []
        build_store(gguf, plan, progress=lambda done, _: heard.append(done))
        with Store.open(plan.folder, plan.key) as store:
            assert store.verify() == ()
    assert (len(heard) < len(plan.pieces)) == (last >= 20)


def test_what_ends_a_build_in_the_middle_leaves_what_is_done(path: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with GGUFFile.open(path) as gguf:
        plan = planned(gguf, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            build_store(gguf, plan, threads=2, progress=interrupt)
        heard: list[int] = []
        build_store(gguf, plan, threads=2, progress=lambda done, _: heard.append(done))
        assert len(heard) < len(plan.pieces) / 2


def test_a_store_is_not_made_of_weights_that_are_not_finite(path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(path) as gguf:
        tensor = gguf.tensors["blk.1.ffn_up_exps.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset + 34 * 9)
        file.write(np.float16("inf").tobytes())
    with GGUFFile.open(path) as gguf:
        plan = planned(gguf, tmp_path)
        with pytest.raises(ModelFormatError, match=r"tensor blk.1.ffn_up_exps.weight holds weights that"):
            build_store(gguf, plan, threads=2)
    assert not plan.folder.exists()
