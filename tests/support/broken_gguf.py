"""The corpus of broken GGUF files, by row of the fault table: small ones, and small ones around a hole of zeros."""

import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload.errors import ModelFormatError
from offload.gguf import GGUFFile
from tests.support.gguf_bytes import ARRAY, BOOL, F32, STRING, U8, U32, U64, GGUFBytes, array, small_model, string

HUGE_COUNTS = (2**31, 2**32, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1)
HOLE_BYTES = 1 << 40  # a sparse file takes no room
F32_TYPE, F16_TYPE, Q4_0_TYPE, Q4_K_TYPE = 0, 1, 2, 12


@dataclass(frozen=True)
class BrokenFile:
    """`data`, a hole and `tail`, to be refused with a message that holds every one of `mentions`."""

    name: str
    data: bytes
    mentions: tuple[str, ...]
    hole_bytes: int = 0
    tail: bytes = b""

    def write(self, folder: Path) -> Path:
        """Puts the file into `folder`."""
        path = folder / "broken.gguf"
        with path.open("wb") as file:
            file.write(self.data)
            file.truncate(len(self.data) + self.hole_bytes)
            file.seek(0, os.SEEK_END)
            file.write(self.tail)
        return path


def strange_starts() -> Iterator[BrokenFile]:
    """Files that are something else, or a version nobody reads (row 1)."""
    yield BrokenFile("empty", b"", ("magic",))
    yield BrokenFile("zip", b"PK\x03\x04" + bytes(100), ("zip",))
    yield BrokenFile("git lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS",))
    yield BrokenFile("web page", b"<!DOCTYPE html><html>", ("web page",))
    yield BrokenFile("ggml", b"lmgg" + bytes(100), ("before GGUF",))
    yield BrokenFile("noise", b"\x00\x01\x02\x03" + bytes(100), ("not a GGUF file",))
    yield BrokenFile("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("big-endian",))
    for version in (0, 1, 4, 2**32 - 1):
        yield BrokenFile(f"version {version}", GGUFBytes(version=version).build(), (f"version {version}", "byte 4"))


def huge_counts() -> Iterator[BrokenFile]:
    """Counts and lengths that the file cannot hold (row 2), each in a short file and in one with a hole of 1 TiB."""
    for count in HUGE_COUNTS:
        for hole in (0, HOLE_BYTES):
            kind = f"{count:#x}{' with a hole' if hole else ''}"
            yield BrokenFile(f"n_tensors {kind}", GGUFBytes(num_tensors=count).build(), ("tensors",), hole)
            yield BrokenFile(f"n_kv {kind}", GGUFBytes(num_keys=count).build(), ("keys",), hole)
            yield BrokenFile(
                f"key length {kind}",
                GGUFBytes(num_keys=1).header() + struct.pack("<Q", count) + bytes(64),
                ("metadata key 0",),
                hole,
            )
            text = GGUFBytes().key("a.text", STRING, struct.pack("<Q", count))
            yield BrokenFile(f"string length {kind}", text.build(), ("'a.text'",), hole)
            for element in (U8, F32, BOOL, U64, STRING):
                values = GGUFBytes().values("an.array", element, [], count)
                yield BrokenFile(f"length of array {element} {kind}", values.build(), ("'an.array'",), hole)
            inner = GGUFBytes().key("words", ARRAY, array(STRING, ["a"], 2) + struct.pack("<Q", count))
            yield BrokenFile(f"string in array {kind}", inner.build(), ("'words'", "string 1"), hole)
            name = GGUFBytes(num_tensors=1).header() + struct.pack("<Q", count) + bytes(64)
            yield BrokenFile(f"tensor name {kind}", name, ("name of tensor 0",), hole)
    yield BrokenFile(
        "nested array",
        GGUFBytes().key("nested", ARRAY, struct.pack("<IQ", ARRAY, 1) + array(U8, [1])).build(),
        ("'nested'", "array of arrays"),
    )
    yield BrokenFile("49 bytes", GGUFBytes().values("x", U8, [], 2**63).build()[:49], ("'x'",))
    yield BrokenFile("many empty strings", GGUFBytes().values("x", STRING, [], 2**32).build(), ("'x'",), HOLE_BYTES)
    yield BrokenFile("value type 13", GGUFBytes().key("x", 13, bytes(8)).build(), ("'x'", "type 13"))
    yield BrokenFile("element type 99", GGUFBytes().key("x", ARRAY, array(99, [], 1)).build(), ("'x'", "type 99"))
    yield BrokenFile("bool 2", GGUFBytes().key("x", BOOL, b"\x02").build(), ("'x'", "bool 2"))
    yield BrokenFile("bool in array", GGUFBytes().values("x", BOOL, [1, 0, 255]).build(), ("'x'", "bool 255"))


def overflowing_tensors() -> Iterator[BrokenFile]:
    """Dimensions, sizes and offsets that overflow or cannot be (row 3)."""

    def one(name: str, mentions: tuple[str, ...], dimensions: tuple[int, ...], **changes: int) -> BrokenFile:
        type_id = changes.pop("type_id", F32_TYPE)
        return BrokenFile(name, GGUFBytes().tensor("t", type_id, dimensions, bytes(64), **changes).build(), mentions)

    yield one("product 2^64", ("'t'", "2^63"), (2**32, 2**32))
    yield one("product 2^66 with a zero", ("'t'", "2^63"), (2**33, 2**33, 0))
    yield one("product wraps to 16", ("'t'", "2^63"), (2**32 + 4, 2**32 + 4))
    yield one("dimension 2^64-1", ("'t'", "2^63"), (2**64 - 1,))
    yield one("bytes beyond 2^64", ("'t'", "needs bytes"), (2**62,))
    yield one("rows cut a block", ("'t'", "Q4_0", "33"), (33, 2), type_id=Q4_0_TYPE)
    yield one("rows cut a super-block", ("'t'", "Q4_K", "32"), (32, 8), type_id=Q4_K_TYPE)
    yield one("five dimensions", ("'t'", "5 dimensions"), (1, 1, 1, 1, 1))
    yield one("2^32-1 dimensions", ("'t'", "4294967295 dimensions"), (), num_dimensions=2**32 - 1)
    yield one("misaligned offset", ("'t'", "multiple of the alignment"), (4,), offset=16)
    for offset in (2**63, 2**64 - 32):
        file = GGUFBytes().tensor("t", F32_TYPE, (4,), offset=offset)
        yield BrokenFile(f"offset {offset:#x}", file.build() + bytes(64), ("'t'", "needs bytes"))


def bad_names() -> Iterator[BrokenFile]:
    """Duplicate, empty and foreign names (row 4)."""
    twice = GGUFBytes().value("a.key", U32, 1).value("b", U32, 1).value("a.key", U32, 1)
    yield BrokenFile("duplicate key", twice.build(), ("'a.key'", "second time"))
    yield BrokenFile("empty key", GGUFBytes().value("", U32, 1).build(), ("metadata key 0", "0 bytes long"))
    yield BrokenFile("key not UTF-8", GGUFBytes().value(b"\xff\xfe", U32, 1).build(), ("metadata key 0", "not UTF-8"))
    long_key = GGUFBytes().value("k" * 70000, U32, 1)
    yield BrokenFile("long key", long_key.build(), ("metadata key 0", "70000 bytes long"))
    tensors = GGUFBytes().tensor("t.weight", F32_TYPE, (4,), bytes(16)).tensor("t.weight", F32_TYPE, (4,), bytes(16))
    yield BrokenFile("duplicate tensor", tensors.build(), ("'t.weight'", "second time"))
    empty = GGUFBytes().tensor("", F32_TYPE, (4,), bytes(16))
    yield BrokenFile("empty tensor name", empty.build(), ("tensor 0", "0 bytes long"))
    foreign = GGUFBytes().tensor(b"\xc3\x28", F32_TYPE, (4,), bytes(16))
    yield BrokenFile("tensor name not UTF-8", foreign.build(), ("tensor 0", "not UTF-8"))


def bad_alignments() -> Iterator[BrokenFile]:
    """Alignments that are none (row 5)."""
    for value in (0, 3, 33, 2**21, 2**31, 2**32 - 1):
        file = GGUFBytes().value("general.alignment", U32, value).tensor("t", F32_TYPE, (4,), bytes(16))
        yield BrokenFile(f"alignment {value}", file.build(), ("general.alignment", str(value), "power of two"))
    for kind, text in ((U64, 32), (U8, 32), (STRING, "32"), (F32, 32.0), (BOOL, 1)):
        file = GGUFBytes().value("general.alignment", kind, text)
        yield BrokenFile(f"alignment of type {kind}", file.build(), ("general.alignment", "uint32"))
    listed = GGUFBytes().values("general.alignment", U32, [32])
    yield BrokenFile("alignment array", listed.build(), ("general.alignment", "uint32"))


def bad_regions() -> Iterator[BrokenFile]:
    """Tensors too short for their type, or over one another (row 6)."""
    short = GGUFBytes().tensor("first", F32_TYPE, (64,), bytes(128)).tensor("second", F32_TYPE, (4,), bytes(16))
    yield BrokenFile("shorter than its type needs", short.build(), ("'first'", "'second'", "256 bytes"))
    same = GGUFBytes().tensor("first", F32_TYPE, (8,), bytes(32)).tensor("second", F32_TYPE, (8,), bytes(32), offset=0)
    yield BrokenFile("same region", same.build(), ("'first'", "'second'"))
    inside = (
        GGUFBytes().tensor("outer", F32_TYPE, (64,), bytes(256)).tensor("inner", F32_TYPE, (4,), bytes(16), offset=64)
    )
    yield BrokenFile("inside another", inside.build(), ("'outer'", "'inner'"))
    back = GGUFBytes().tensor("late", F32_TYPE, (16,), bytes(64), offset=32).tensor("early", F32_TYPE, (16,), offset=0)
    yield BrokenFile("table out of order", back.build(), ("'early'", "'late'"))
    unknown = GGUFBytes().tensor("first", 999, (8,), bytes(32)).tensor("second", 998, (8,), bytes(32), offset=0)
    yield BrokenFile("unknown types in one place", unknown.build(), ("'first'", "'second'"))
    last = GGUFBytes().tensor("last", F16_TYPE, (64,), bytes(64))
    yield BrokenFile("last one too short", last.build(), ("'last'", "needs bytes"))


def costly_files() -> Iterator[BrokenFile]:
    """Files that make a reader work as hard as its bounds allow before the fault comes."""
    tail = string("tail") + struct.pack("<I", 77)
    mentions = ("'tail'", "type 77")
    words = GGUFBytes(num_keys=2).values("words", STRING, [], 1 << 21).build()
    yield BrokenFile("2^21 empty strings", words, mentions, 8 << 21, tail)
    more = string("more") + struct.pack("<I", ARRAY) + array(STRING, [], 1) + bytes(8)
    yield BrokenFile("2^21 + 1 strings in two arrays", words, ("'more'", "more than 2097152"), 8 << 21, more)
    numbers = GGUFBytes(num_keys=2).values("numbers", U8, [], 63 << 20).build()
    yield BrokenFile("63 MiB of numbers", numbers, mentions, 63 << 20, tail)
    text = GGUFBytes(num_keys=2).key("text", STRING, struct.pack("<Q", 63 << 20)).build()
    yield BrokenFile("63 MiB of text", text, mentions, 63 << 20, tail)
    keys = GGUFBytes(num_keys=1 << 14)
    for index in range((1 << 14) - 1):
        keys.value(f"{index:05}" + "k" * 1000 + "😀", U8, 1)
    yield BrokenFile("16383 long keys", keys.build(), mentions, 0, tail)
    tensors = GGUFBytes(num_tensors=1 << 16)
    for index in range((1 << 16) - 1):
        tensors.tensor(f"{index:05}" + "t" * 100 + "😀", F32_TYPE, (0, 1, 1, 1), offset=0)
    yield BrokenFile(
        "65535 tensors", tensors.header(), ("'tail'", "9 dimensions"), 0, string("tail") + bytes([9] + [0] * 63)
    )


def cut_files(version: int) -> Iterator[BrokenFile]:
    """A sound file, cut after every byte (row 1)."""
    whole = small_model(version).build()
    for length in range(len(whole)):
        yield BrokenFile(f"cut at {length}", whole[:length], ())


def assert_refused(broken: BrokenFile, folder: Path) -> None:
    """The file is refused within a second of CPU time, by a message that names it, the fault and the next step."""
    path = broken.write(folder)
    start = time.process_time()
    with pytest.raises(ModelFormatError) as caught:
        GGUFFile.open(path).close()
    elapsed = time.process_time() - start
    message = str(caught.value)
    assert elapsed < 1, f"{broken.name}: {elapsed:.2f} s"
    assert str(path) in message
    assert caught.value.hint
    for mention in broken.mentions:
        assert mention in message, f"{broken.name}: {message}"
