"""Opening a file, its index and its bytes."""

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from offload.errors import FlashError, ModelFormatError
from offload.gguf import GGUFFile
from tests.support.gguf_bytes import CODES, F32, F64, STRING, GGUFBytes, small_model


@pytest.fixture(params=[2, 3])
def gguf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GGUFFile]:
    path = tmp_path / "model.gguf"
    path.write_bytes(small_model(request.param).build())
    with GGUFFile.open(path) as file:
        assert file.version == request.param
        yield file


def test_identity_of_the_file(gguf: GGUFFile) -> None:
    assert gguf.paths == (gguf.path,)
    assert gguf.byte_size == gguf.path.stat().st_size
    assert gguf.alignment == 32
    assert gguf.architecture == "llama"


def test_every_kind_of_value(gguf: GGUFFile) -> None:
    for kind in CODES:
        value = gguf.metadata[f"scalar.{kind}"]
        assert value == 1
        values = gguf.metadata[f"array.{kind}"]
        assert isinstance(values, np.ndarray)
        assert values.tolist() == [1, 0, 1]
        assert not values.flags.writeable
    assert gguf.metadata["scalar.7"] is True
    assert isinstance(gguf.metadata[f"scalar.{F32}"], float)
    assert isinstance(gguf.metadata[f"scalar.{F64}"], float)
    assert list(gguf.get_strings("tokenizer.ggml.tokens")) == ["<s>", "a", "", "é", "😀"]
    assert next(iter(gguf.metadata)) == "general.architecture"
    assert "nothing" not in gguf.metadata


def test_tensors_in_file_order_with_reversed_shapes(gguf: GGUFFile) -> None:
    assert list(gguf.tensors) == ["token_embd.weight", "blk.0.ffn_up_exps.weight", "output.weight"]
    tensor = gguf.tensors["token_embd.weight"]
    assert (tensor.shape, tensor.quant_type.name, tensor.num_bytes, tensor.num_experts) == ((5, 4), "F32", 80, 0)
    assert tensor.num_elements == 20
    assert bytes(gguf.read(tensor)) == bytes(range(80))
    assert gguf.tensors["output.weight"].quant_type.name == "F16"


def test_experts(gguf: GGUFFile) -> None:
    stacked = gguf.tensors["blk.0.ffn_up_exps.weight"]
    assert (stacked.shape, stacked.num_experts) == ((3, 2, 32), 3)
    assert stacked.expert_slice(2) == (stacked.offset + 72, 36)
    assert bytes(gguf.read(stacked, expert=1)) == bytes(range(36, 72))
    for expert in (-1, 3):
        with pytest.raises(IndexError, match="stacks 3"):
            gguf.read(stacked, expert=expert)
    with pytest.raises(IndexError, match="stacks 0"):
        gguf.read(gguf.tensors["output.weight"], expert=0)


def test_read_into(gguf: GGUFFile) -> None:
    tensor = gguf.tensors["token_embd.weight"]
    destination = np.zeros((3, 4), dtype=np.uint8)
    gguf.read_into(tensor, destination, start=68)
    assert destination.ravel().tolist() == list(range(68, 80))
    gguf.read_into(tensor, np.empty((0, 4), dtype=np.uint8), start=80)
    for start in (-1, 69):
        with pytest.raises(ValueError, match="which has 80"):
            gguf.read_into(tensor, destination, start=start)
    with pytest.raises(ValueError, match="not contiguous"):
        gguf.read_into(tensor, np.zeros((4, 4), dtype=np.uint8)[:, ::2])


def test_closing(gguf: GGUFFile) -> None:
    tensor = gguf.tensors["output.weight"]
    gguf.close()
    gguf.close()
    with pytest.raises(FlashError, match="closed"):
        gguf.read(tensor)


def test_a_forgotten_file_gives_its_descriptor_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small_model().build())
    gguf = GGUFFile.open(path)
    source = weakref.ref(gguf._sources[0])
    descriptor = gguf._sources[0]._descriptor
    del gguf
    gc.collect()
    assert source() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(GGUFBytes().value("general.architecture", STRING, "llama").build())
    with GGUFFile.open(path) as gguf:
        assert gguf.tensors == {}


def test_nothing_at_all(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(GGUFBytes().build())
    with GGUFFile.open(path) as gguf:
        assert len(gguf.metadata) == 0
        with pytest.raises(ModelFormatError, match=r"empty\.gguf: metadata key 'general\.architecture' is missing"):
            _ = gguf.architecture


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    far = 5 << 30
    file = GGUFBytes().tensor("near", 24, (far,), b"n").tensor("far", 24, (3,), b"", offset=far)
    path = tmp_path / "large.gguf"
    header = file.header()
    start = -(-len(header) // 32) * 32
    with path.open("wb") as stream:
        stream.write(header)
        stream.seek(start + far)
        stream.write(b"far")
    with GGUFFile.open(path) as gguf:
        assert bytes(gguf.read(gguf.tensors["far"])) == b"far"
        assert gguf.tensors["far"].offset == start + far
        last = np.empty(2, dtype=np.uint8)
        gguf.read_into(gguf.tensors["near"], last, start=far - 2)
        assert last.tolist() == [0, 0]


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FlashError, match=r"missing\.gguf: cannot be opened: No such file") as caught:
        GGUFFile.open(tmp_path / "missing.gguf")
    assert caught.value.hint
    with pytest.raises(ModelFormatError, match="not a regular file"):
        GGUFFile.open(tmp_path)
    with pytest.raises(FlashError, match="cannot be opened"):
        GGUFFile.open("nul\0byte.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFormatError, match="not a regular file"):
        GGUFFile.open(tmp_path / "pipe.gguf")


def test_real_files_open(shared_data: Path) -> None:
    for path in sorted(shared_data.rglob("*.gguf")):
        with GGUFFile.open(path) as gguf:
            assert gguf.architecture
            assert sum(tensor.num_bytes for tensor in gguf.tensors.values()) <= gguf.byte_size
