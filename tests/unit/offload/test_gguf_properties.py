"""Open inputs: random damage to a sound file, and random metadata written by two writers."""

import math
import struct
import time
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import StrataError
from offload.gguf import GGUFFile, StringArray
from tests.support.gguf_bytes import BOOL, CODES, F32, F64, STRING, GGUFBytes, small_model

WHOLE = small_model().build()
HEADER = len(small_model().header())
COMMON = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)  # files are written anew
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]), st.integers(0, 40), st.integers(0, 2**64 - 1)
)
PLACES = st.sampled_from(range(HEADER + 40))  # evenly, into the data too


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The file after a few flips, cuts, insertions and overwritten integers."""
    data = bytearray(WHOLE)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = min(draw(PLACES), max(len(data) - 1, 0))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "u32", "u64"]))
        if kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 24))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=24))
        elif kind == "u32":
            data[at : at + 4] = struct.pack("<I", draw(NUMBERS) & 0xFFFFFFFF)
        else:
            data[at : at + 8] = struct.pack("<Q", draw(NUMBERS))
    return bytes(data)


@settings(COMMON, max_examples=400)
@given(data=damaged())
def test_a_damaged_file_opens_or_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    start = time.process_time()
    try:
        with GGUFFile.open(path) as gguf:
            for tensor in gguf.tensors.values():
                assert tensor.offset + tensor.num_bytes <= len(data) or tensor.num_bytes == 0
                assert gguf.read(tensor).nbytes == tensor.num_bytes
            for value in gguf.metadata.values():
                assert repr(value)
    except StrataError as error:
        assert str(path) in str(error)
    assert time.process_time() - start < 1


@COMMON
@given(data=st.binary(max_size=200))
def test_noise_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + data)
    try:
        GGUFFile.open(path).close()
    except StrataError as error:
        assert str(path) in str(error)


def scalars(kind: int) -> st.SearchStrategy[Any]:
    """Values that the type holds exactly."""
    if kind == BOOL:
        return st.booleans()
    if kind == STRING:
        return st.text(max_size=300)
    if kind in (F32, F64):
        return st.floats(width=32 if kind == F32 else 64)
    bits = 8 * struct.calcsize(CODES[kind])
    signed = CODES[kind].islower()
    return st.integers(-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed) - 1)


KINDS = [*CODES, STRING]
VALUES = st.one_of(
    *[st.tuples(st.just(kind), st.just(False), scalars(kind)) for kind in KINDS],
    *[st.tuples(st.just(kind), st.just(True), st.lists(scalars(kind), min_size=1, max_size=4)) for kind in KINDS],
)
METADATA = st.dictionaries(st.text(min_size=1, max_size=12), VALUES, max_size=6)


def equal(read: Any, written: Any) -> bool:
    """Equality that counts NaN as equal to itself."""
    if isinstance(read, np.ndarray | StringArray):
        return len(read) == len(written) and all(map(equal, list(read), written))
    if isinstance(written, float) and math.isnan(written):
        return math.isnan(read)
    return bool(read == written)


@COMMON
@given(metadata=METADATA, version=st.sampled_from([2, 3]))
def test_metadata_written_by_hand_comes_back(metadata: dict[str, Any], version: int, tmp_path: Path) -> None:
    file = GGUFBytes(version=version)
    for key, (kind, is_array, value) in metadata.items():
        if key != "general.alignment":
            (file.values if is_array else file.value)(key, kind, value)
    path = tmp_path / "metadata.gguf"
    path.write_bytes(file.build())
    with GGUFFile.open(path) as gguf:
        assert list(gguf.metadata) == list(metadata)
        for key, (_, _, value) in metadata.items():
            assert equal(gguf.metadata[key], value), key


WRITABLE = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.booleans(),
    st.text(max_size=20),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
    st.lists(st.text(max_size=8), min_size=1, max_size=4),
)


@settings(COMMON, max_examples=40)
@given(
    metadata=st.dictionaries(st.from_regex(r"[a-z_]{1,8}\.[a-z_]{1,8}", fullmatch=True), WRITABLE, max_size=5),
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=4),
)
def test_what_the_gguf_package_writes_comes_back(
    metadata: dict[str, Any], shapes: list[list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "package.gguf"
    writer = gguf_package.GGUFWriter(path, "test")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_int32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    arrays = {f"t.{index}": np.random.default_rng(index).random(shape) for index, shape in enumerate(shapes)}
    for name, array in arrays.items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as gguf:
        for key, value in metadata.items():
            if value != "":  # the writer leaves empty texts out
                assert equal(gguf.metadata[key], value), key
        assert list(gguf.tensors) == list(arrays)
        for name, array in arrays.items():
            tensor = gguf.tensors[name]
            assert tensor.shape == array.shape
            assert np.array_equal(gguf.read(tensor).view(np.float32).reshape(array.shape), array.astype(np.float32))


@pytest.mark.parametrize("length", [1, 255, 256, 257, 65535, 65536, 70_000, 9_000_000])
def test_long_texts_and_arrays_cross_the_windows(length: int, tmp_path: Path) -> None:
    text, strings = "é" + "x" * (length - 1), [str(index) for index in range(min(length, 70_000))]
    file = GGUFBytes().value("text", STRING, text).values("strings", STRING, strings).value("end", STRING, "end")
    file.values("numbers", 0, [7] * min(length, 70_000)).value("after", STRING, "after")
    path = tmp_path / "long.gguf"
    path.write_bytes(file.build())
    with GGUFFile.open(path) as gguf:
        assert gguf.get_str("text") == text
        assert list(gguf.get_strings("strings")) == strings
        assert gguf.get_str("end") == "end"
        assert gguf.get_ints("numbers").sum() == 7 * min(length, 70_000)
        assert gguf.get_str("after") == "after"
