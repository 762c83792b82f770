"""A bounded walk over the header of one GGUF file: integers, strings, arrays, each checked before it is allocated.

Knows the encoding of GGUF's values and nothing about keys, tensors or architectures. Two bounds hold for every count
and length in the file: the bytes that remain in the file, and `MAX_HEADER_BYTES`, so that a broken header of a huge
(or sparse) file costs little time and memory. The header is read in windows that grow; nothing is memory-mapped.
"""

import struct
from array import array

import numpy as np

from offload.errors import ModelFormatError
from offload.gguf_values import (
    ARRAY,
    BOOL,
    LENGTH_BYTES,
    SCALAR_DTYPES,
    STRING,
    MetadataValue,
    StringArray,
    Text,
    decode_text,
)
from offload.source import FileName, Source

MAX_HEADER_BYTES = 64 << 20  # 128k tokens with scores and 280k merges take 10.5 MB
MAX_STRINGS = 1 << 21  # in all arrays together
LONG_TEXT_BYTES = 256
LARGE_VALUE_BYTES = 1 << 16
FIRST_WINDOW_BYTES = 1 << 16
LAST_WINDOW_BYTES = 1 << 22

DAMAGED = "the file is damaged or cut short: download it again"
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class HeaderCursor:
    """Reads a header front to back; `position` is the byte that comes next."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._window: bytes | bytearray = b""
        self._window_start = 0
        self._window_bytes = FIRST_WINDOW_BYTES
        self._num_strings = 0
        self.position = 0

    @property
    def path(self) -> FileName:
        """The file, for messages."""
        return self._source.path

    @property
    def remaining(self) -> int:
        """Bytes from the position to the end of the file."""
        return self._source.size - self.position

    def broken(self, problem: str, position: int | None = None, hint: str = DAMAGED) -> ModelFormatError:
        """The error to raise for `problem` at `position` (the current one by default)."""
        at = self.position if position is None else position
        return ModelFormatError(f"{self.path}: byte {at}: {problem}", hint=hint)

    def require(self, count: int, what: str) -> None:
        """ModelFormatError unless `count` more bytes are in the file and within the header's bound."""
        if count > self.remaining:
            raise self.broken(f"{what} needs {count} bytes, {self.remaining} remain in the file")
        if self.position + count > MAX_HEADER_BYTES:
            raise self.broken(
                f"{what} needs {count} bytes and takes the header past {MAX_HEADER_BYTES >> 20} MiB, the most allowed"
            )

    def _read(self, start: int, count: int) -> bytearray:
        data = bytearray(count)
        self._source.read_into(memoryview(data), start)
        return data

    def _next_window(self, start: int, least: int) -> bytearray:
        """The bytes from `start`: `least` (already required) or more, never beyond the file or the header's bound."""
        most = min(self._source.size, MAX_HEADER_BYTES) - start
        count = max(least, min(self._window_bytes, most))
        self._window_bytes = min(2 * self._window_bytes, LAST_WINDOW_BYTES)
        return self._read(start, count)

    def take(self, count: int, what: str) -> bytes | bytearray:
        """The next `count` bytes, the caller's own."""
        begin = self.position - self._window_start
        if not 0 <= begin <= begin + count <= len(self._window):
            self.require(count, what)
            if count >= LARGE_VALUE_BYTES:
                data = self._read(self.position, count)
                self.position += count
                return data
            self._window = self._next_window(self.position, count)
            self._window_start = self.position
            begin = 0
        self.position += count
        return self._window[begin : begin + count]

    def u32(self, what: str) -> int:
        """An unsigned 32-bit integer."""
        value: int = _U32.unpack(self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        """An unsigned 64-bit integer."""
        value: int = _U64.unpack(self.take(8, what))[0]
        return value

    def numbers(self, layout: struct.Struct, what: str) -> tuple[int, ...]:
        """Several integers at once."""
        return layout.unpack(self.take(layout.size, what))

    def name(self, what: str, most: int) -> str:
        """A key or a tensor's name: not empty, UTF-8, at most `most` bytes long."""
        start = self.position
        length = self.u64(f"the length of {what}")
        if not 0 < length <= most:
            raise self.broken(f"{what} is {length} bytes long, 1 to {most} are allowed", start)
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"{what} ({bytes(data[:40])!r}) is not UTF-8", start) from error

    def value(self, key: str) -> tuple[int, MetadataValue | Text]:
        """(type number, value) of `key`."""
        kind = self.u32(f"the type of key {key!r}")
        if kind == STRING:
            return kind, self._text(key)
        if kind == ARRAY:
            return kind, self._array(key)
        if kind not in SCALAR_DTYPES:
            raise self.broken(f"key {key!r} has value type {kind}, which GGUF does not define", self.position - 4)
        dtype = SCALAR_DTYPES[kind]
        start = self.position
        data = self.take(dtype.itemsize, f"key {key!r}")
        if kind == BOOL:
            self._check_bools(key, data, start)
        scalar: bool | int | float = np.frombuffer(data, dtype=dtype)[0].item()
        return kind, scalar

    def _check_bools(self, key: str, data: bytes | bytearray, start: int) -> None:
        foreign = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) > 1)
        if foreign.size:
            at = int(foreign[0])
            raise self.broken(f"key {key!r} holds the bool {data[at]}, only 0 and 1 are allowed", start + at)

    def _text(self, key: str) -> str | Text:
        length = self.u64(f"the length of key {key!r}")
        data = self.take(length, f"the text of key {key!r}")
        return Text(data) if length >= LONG_TEXT_BYTES else decode_text(data)

    def _array(self, key: str) -> MetadataValue:
        kind = self.u32(f"the element type of key {key!r}")
        if kind == ARRAY:
            raise self.broken(f"key {key!r} is an array of arrays, which is not supported", self.position - 4)
        if kind != STRING and kind not in SCALAR_DTYPES:
            raise self.broken(f"key {key!r} has element type {kind}, which GGUF does not define", self.position - 4)
        count = self.u64(f"the length of key {key!r}")
        if kind == STRING:
            return self._strings(key, count)
        dtype = SCALAR_DTYPES[kind]
        what = f"key {key!r} with {count} elements of {dtype.itemsize} bytes"
        self.require(count * dtype.itemsize, what)
        start = self.position
        data = self.take(count * dtype.itemsize, what)
        if kind == BOOL:
            self._check_bools(key, data, start)
        values = np.frombuffer(data, dtype=dtype)
        values.setflags(write=False)
        return values

    def _strings(self, key: str, count: int) -> StringArray:
        """Finds where each of `count` strings begins; their bytes are kept as they are."""
        self.require(LENGTH_BYTES * count, f"key {key!r} with {count} strings")
        self._num_strings += count
        if self._num_strings > MAX_STRINGS:
            raise self.broken(f"key {key!r} has {count} strings; more than {MAX_STRINGS} in one file are not allowed")
        origin = self.position
        raw = bytearray(self._window[origin - self._window_start :])
        starts = array("q")
        append, unpack = starts.append, _U64.unpack_from
        held, start = len(raw), LENGTH_BYTES  # bytes in `raw`; where the next string's bytes begin in it
        for index in range(count):
            if start > held:
                held = self._extend(raw, origin, start, f"string {index} of key {key!r}")
            append(start)
            start += unpack(raw, start - LENGTH_BYTES)[0] + LENGTH_BYTES
            if start - LENGTH_BYTES > held:
                held = self._extend(raw, origin, start - LENGTH_BYTES, f"string {index} of key {key!r}")
        append(start)
        end = start - LENGTH_BYTES
        self._window, self._window_start = raw[end:], origin + end
        self.position = origin + end
        del raw[end:]
        return StringArray(raw, np.frombuffer(starts, dtype=np.int64))

    def _extend(self, raw: bytearray, origin: int, least: int, what: str) -> int:
        """Reads on until `raw` (the bytes from `origin`) holds `least` bytes or more; the new length."""
        self.position = origin + len(raw)
        self.require(least - len(raw), what)
        raw += self._next_window(self.position, least - len(raw))
        return len(raw)
