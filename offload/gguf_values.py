"""Values of GGUF metadata: scalars, texts, numeric arrays, and string arrays that are decoded only where looked at.

Knows nothing about files or about what a key means. Texts are UTF-8; bytes that are not (rare vocabularies hold
some) become lone surrogates (`errors="surrogateescape"`), so that `text.encode("utf-8", "surrogateescape")` gives
the file's bytes back.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

LENGTH_BYTES = 8  # of the length in front of every string

SCALAR_DTYPES: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Value type number in the file -> numpy type, of the types with a fixed size."""

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9


def decode_text(data: bytes | bytearray | memoryview) -> str:
    """UTF-8 to text; foreign bytes become lone surrogates."""
    return str(data, "utf-8", "surrogateescape")


class StringArray(Sequence[str]):
    """Strings of one metadata array over their bytes in the file; an element is decoded when it is asked for.

    `raw` holds length-prefixed strings, `starts` (count + 1) the offset in it of each one's first byte and, at the end,
    where the next one's would be.
    """

    __slots__ = ("_raw", "_starts")

    def __init__(self, raw: bytes | bytearray, starts: NDArray[np.int64]) -> None:
        self._raw = raw
        self._starts = starts

    @property
    def num_bytes(self) -> int:
        """Memory held: the strings' bytes with their lengths, and the offset table."""
        return len(self._raw) + self._starts.nbytes

    def __len__(self) -> int:
        return len(self._starts) - 1

    def encoded(self, index: int) -> bytes:
        """The bytes of element `index` as they stand in the file; IndexError outside of the array."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} in an array of {len(self)} strings")
        start, following = self._starts[position : position + 2].tolist()
        return bytes(self._raw[start : following - LENGTH_BYTES])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [decode_text(self.encoded(position)) for position in range(*index.indices(len(self)))]
        return decode_text(self.encoded(index))

    def __iter__(self) -> Iterator[str]:
        raw, starts = self._raw, self._starts.tolist()
        for index in range(len(starts) - 1):
            yield raw[starts[index] : starts[index + 1] - LENGTH_BYTES].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray | list | tuple):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(text) for text in self[:3])
        return f"StringArray({len(self)} strings: [{shown}{', ...' if len(self) > 3 else ''}])"


class Text:
    """A string that is kept as bytes and decoded on each use: some files embed megabytes of JSON nobody asks for."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes | bytearray) -> None:
        self.raw = raw


MetadataValue: TypeAlias = bool | int | float | str | StringArray | NDArray[Any]


class Metadata(Mapping[str, MetadataValue]):
    """Key -> value in file order; immutable."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, MetadataValue | Text]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> MetadataValue:
        value = self._values[key]
        return decode_text(value.raw) if isinstance(value, Text) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
