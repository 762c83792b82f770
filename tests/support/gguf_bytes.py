"""A raw builder of GGUF bytes for tests: writes what it is told, right or wrong, and checks nothing."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
Scalar = bool | int | float | str | bytes


def string(text: str | bytes) -> bytes:
    """A length-prefixed string."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: Scalar) -> bytes:
    """A value without its type number."""
    if kind == STRING:
        assert isinstance(value, str | bytes)
        return string(value)
    return struct.pack("<" + CODES[kind], value)


def array(kind: int, values: Sequence[Scalar], count: int | None = None) -> bytes:
    """An array without the type number of the array; `count` lies about its length."""
    head = struct.pack("<IQ", kind, len(values) if count is None else count)
    return head + b"".join(scalar(kind, value) for value in values)


@dataclass
class TensorBytes:
    """A line of the tensor table and the bytes it stands for."""

    name: str | bytes
    type_id: int
    dimensions: tuple[int, ...]  # as the file has them: columns first
    data: bytes
    offset: int
    num_dimensions: int

    def entry(self) -> bytes:
        """The line."""
        sizes = struct.pack(f"<{len(self.dimensions)}Q", *self.dimensions)
        return (
            string(self.name)
            + struct.pack("<I", self.num_dimensions)
            + sizes
            + struct.pack("<IQ", self.type_id, self.offset)
        )


@dataclass
class GGUFBytes:
    """Collects keys and tensors; `build` gives the file. Counts may be set to lie."""

    version: int = 3
    alignment: int = 32
    magic: bytes = b"GGUF"
    num_keys: int | None = None
    num_tensors: int | None = None
    keys: list[bytes] = field(default_factory=list)
    tensors: list[TensorBytes] = field(default_factory=list)

    def key(self, name: str | bytes, kind: int, payload: bytes) -> "GGUFBytes":
        """A key whose value is given as raw bytes."""
        self.keys.append(string(name) + struct.pack("<I", kind) + payload)
        return self

    def value(self, name: str | bytes, kind: int, value: Scalar) -> "GGUFBytes":
        """A key with a scalar or string."""
        return self.key(name, kind, scalar(kind, value))

    def values(self, name: str | bytes, kind: int, values: Sequence[Scalar], count: int | None = None) -> "GGUFBytes":
        """A key with an array."""
        return self.key(name, ARRAY, array(kind, values, count))

    def tensor(
        self,
        name: str | bytes,
        type_id: int,
        dimensions: Sequence[int],
        data: bytes = b"",
        *,
        offset: int | None = None,
        num_dimensions: int | None = None,
    ) -> "GGUFBytes":
        """A tensor; it is put after the ones before, aligned, unless `offset` says otherwise."""
        if offset is None:
            end = max((entry.offset + len(entry.data) for entry in self.tensors), default=0)
            offset = -(-end // self.alignment) * self.alignment
        self.tensors.append(
            TensorBytes(
                name,
                type_id,
                tuple(dimensions),
                data,
                offset,
                len(dimensions) if num_dimensions is None else num_dimensions,
            )
        )
        return self

    def header(self) -> bytes:
        """The bytes before the data section, without padding."""
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_keys)
        return head + b"".join(self.keys) + b"".join(entry.entry() for entry in self.tensors)

    def build(self) -> bytes:
        """The whole file; data of tensors is written where their offsets say, as far as they hold any."""
        header = self.header()
        if not self.tensors:
            return header
        data = bytearray(-len(header) % self.alignment)
        start = len(data)
        for entry in self.tensors:
            if entry.data:
                end = start + entry.offset + len(entry.data)
                data += bytes(max(0, end - len(data)))
                data[start + entry.offset : end] = entry.data
        return header + bytes(data)


def small_model(version: int = 3) -> GGUFBytes:
    """A sound file with every kind of value and a few tensors."""
    file = GGUFBytes(version=version)
    file.value("general.architecture", STRING, "llama")
    for kind in CODES:
        file.value(f"scalar.{kind}", kind, 1)
        file.values(f"array.{kind}", kind, [1, 0, 1])
    file.values("tokenizer.ggml.tokens", STRING, ["<s>", "a", "", "é", "😀"])
    file.tensor("token_embd.weight", 0, (4, 5), bytes(range(80)))
    file.tensor("blk.0.ffn_up_exps.weight", 2, (32, 2, 3), bytes(range(108)))
    return file.tensor("output.weight", 1, (4, 5), bytes(range(100, 140)))
