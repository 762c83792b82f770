"""Models in several files."""

from pathlib import Path

import pytest

from offload.errors import FlashError, ModelFormatError
from offload.gguf import GGUFFile
from tests.support.gguf_bytes import I32, STRING, U16, U32, GGUFBytes


def shard(number: int, count: int, tensors: dict[str, bytes], total: int | None = 3, alignment: int = 32) -> GGUFBytes:
    file = GGUFBytes(alignment=alignment)
    if number == 0:
        file.value("general.architecture", STRING, "llama")
    if alignment != 32:
        file.value("general.alignment", U32, alignment)
    file.value("split.no", U16, number).value("split.count", U16, count)
    if total is not None:
        file.value("split.tensors.count", I32, total)
    for name, data in tensors.items():
        file.tensor(name, 24, (len(data),), data)
    return file


def write(folder: Path, shards: list[GGUFBytes], count: int | None = None) -> list[Path]:
    paths = []
    for index, file in enumerate(shards):
        paths.append(folder / f"a-00009-of-name-{index + 1:05}-of-{count or len(shards):05}.gguf")
        paths[-1].write_bytes(file.build())
    return paths


def three() -> list[GGUFBytes]:
    return [
        shard(0, 3, {"a": b"aa"}),
        shard(1, 3, {"b": b"bbb"}, alignment=64),
        shard(2, 3, {"c": b"c"}),
    ]


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_shard_opens_all(opened: int, tmp_path: Path) -> None:
    paths = write(tmp_path, three())
    with GGUFFile.open(paths[opened]) as gguf:
        assert gguf.path == paths[opened]
        assert gguf.paths == tuple(paths)
        assert gguf.architecture == "llama"
        assert list(gguf.tensors) == ["a", "b", "c"]
        assert [tensor.shard for tensor in gguf.tensors.values()] == [0, 1, 2]
        assert [bytes(gguf.read(tensor)) for tensor in gguf.tensors.values()] == [b"aa", b"bbb", b"c"]
        assert gguf.byte_size == sum(path.stat().st_size for path in paths)


def test_one_shard_of_one(tmp_path: Path) -> None:
    path = tmp_path / "under-any-name.gguf"
    path.write_bytes(shard(0, 1, {"a": b"a"}).build())
    with GGUFFile.open(path) as gguf:
        assert gguf.paths == (path,)


def test_a_name_alone_makes_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    path.write_bytes(GGUFBytes().tensor("a", 24, (1,), b"a").build())
    with GGUFFile.open(path) as gguf:
        assert list(gguf.tensors) == ["a"]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_shard_is_named(missing: int, tmp_path: Path) -> None:
    paths = write(tmp_path, three())
    paths[missing].unlink()
    with pytest.raises(ModelFormatError, match=rf"-0000{missing + 1}-of-00003\.gguf: this shard of .* is missing"):
        GGUFFile.open(paths[0 if missing else 1])


def test_a_shard_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    paths = write(tmp_path, three())
    paths[1].unlink()
    paths[1].symlink_to(paths[1])
    with pytest.raises(FlashError, match=r"-00002-of-00003\.gguf: cannot be opened"):
        GGUFFile.open(paths[0])


def test_a_renamed_shard_cannot_find_the_others(tmp_path: Path) -> None:
    paths = write(tmp_path, three())
    renamed = paths[1].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFormatError, match=r"shard 2 of 3, but its name does not end in -00002-of-00003\.gguf"):
        GGUFFile.open(renamed)


def test_counts_in_name_and_metadata_must_agree(tmp_path: Path) -> None:
    paths = write(tmp_path, three(), count=4)
    with pytest.raises(ModelFormatError, match="does not end in -00001-of-00003"):
        GGUFFile.open(paths[0])


FAULTS = [
    ([shard(0, 2, {"a": b"a"}, 2), shard(0, 2, {"b": b"b"}, 2)], "says it is shard 1 of 2, but its name says 2 of 2"),
    ([shard(0, 2, {"a": b"a"}, 2), shard(1, 3, {"b": b"b"}, 2)], "says it is shard 2 of 3, but its name says 2 of 2"),
    ([shard(0, 2, {"a": b"a"}, 2), shard(1, 2, {"a": b"b"}, 2)], "tensor 'a' stands in .*-00001-of-00002.gguf too"),
    ([shard(0, 2, {"a": b"a"}, 2), shard(1, 2, {"b": b"b"}, 3)], "split.tensors.count is 3, but 2 in"),
    ([shard(0, 2, {"a": b"a"}, 5), shard(1, 2, {"b": b"b"}, 5)], "split.tensors.count is 5, but the shards hold 2"),
    ([shard(0, 2, {"a": b"a"}, 2), GGUFBytes().tensor("b", 24, (1,), b"b")], "says it is shard 1 of 1"),
]


@pytest.mark.parametrize(("shards", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_shards_of_different_models_are_refused(shards: list[GGUFBytes], message: str, tmp_path: Path) -> None:
    paths = write(tmp_path, shards)
    with pytest.raises(ModelFormatError, match=message) as caught:
        GGUFFile.open(paths[0])
    assert caught.value.hint


def test_the_count_of_tensors_may_be_left_out(tmp_path: Path) -> None:
    paths = write(tmp_path, [shard(0, 2, {"a": b"a"}, None), shard(1, 2, {"b": b"b"}, None)])
    with GGUFFile.open(paths[1]) as gguf:
        assert len(gguf.tensors) == 2


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    paths = write(tmp_path, three())
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    with pytest.raises(ModelFormatError, match=r"-00003-of-00003\.gguf: tensor 'c'"):
        GGUFFile.open(paths[0])
