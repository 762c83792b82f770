"""SentencePiece's precompiled character map: a trie of byte strings and what each is replaced with.

The map is a double array (Kanda 2018, XOR-compressed): a 32-bit unit holds a label in bits 0-7, "has a value" in bit 8,
the offset to its children in bits 10-30 (times 256 if bit 9 is set); a value is a unit with bit 31 set. Replacements
follow as zero-terminated strings. Knows nothing about tokens beyond the texts that pass through unchanged.
"""

import struct
from typing import Final

import numpy as np

from offload.gguf import GGUFFile
from runtime.tokenizer.vocabulary import wrong

KEY: Final = "tokenizer.ggml.precompiled_charsmap"


class CharacterMap:
    """Longest match first; without a map in the file, text stays as it is."""

    def __init__(self, gguf: GGUFFile, untouched: list[str]) -> None:
        """`untouched` texts, and characters that begin one, are left alone. ModelFormatError for a broken map."""
        self._gguf = gguf
        self._untouched = {text[:end].encode() for text in untouched for end in range(1, len(text) + 1)}
        data = gguf.get_ints(KEY, None)
        blob = b"" if data is None else data.astype(np.uint8).tobytes()
        self._units: tuple[int, ...] = ()
        self._replacements = b""
        if data is not None:
            if len(blob) < 4 or struct.unpack_from("<I", blob)[0] + 4 >= len(blob):
                raise wrong(gguf, KEY, f"of {len(blob)} bytes is shorter than it says")
            size = struct.unpack_from("<I", blob)[0] // 4
            self._units = struct.unpack_from(f"<{size}I", blob, 4)
            self._replacements = blob[4 + struct.unpack_from("<I", blob)[0] :]

    def apply(self, text: str) -> str:
        """The text with every match replaced; ModelFormatError where the map points outside of itself."""
        if not self._units and not self._untouched:
            return text
        data = text.encode()
        parts: list[bytes] = []
        at = 0
        while at < len(data):
            replacement, length = self._replace(data, at)
            parts.append(replacement)
            at += length
        return b"".join(parts).decode()

    def _replace(self, data: bytes, at: int) -> tuple[bytes, int]:
        """What stands for the longest match at byte `at`, and how many bytes it covers."""
        end = at
        while end < len(data) and data[at : end + _character_bytes(data[end])] in self._untouched:
            end += _character_bytes(data[end])
        if end > at:
            return data[at:end], end - at
        length, value = self._longest_match(data, at)
        if length:
            end = self._replacements.find(b"\0", value)
            if end < 0:
                raise wrong(self._gguf, KEY, f"has no replacement at {value}")
            return self._replacements[value:end], length
        length = _character_bytes(data[at])
        return data[at : at + length], length

    def _longest_match(self, data: bytes, at: int) -> tuple[int, int]:
        """Bytes matched (0 for none) and where the replacement begins."""
        if not self._units:
            return 0, 0
        length = value = 0
        node = _children(self._unit(0))
        for end in range(at, len(data)):
            byte = data[end]
            node ^= byte
            unit = self._unit(node)
            if byte == 0 or unit & 0x800000FF != byte:
                break
            node ^= _children(unit)
            if unit & 0x100:
                length, value = end - at + 1, self._unit(node) & 0x7FFFFFFF
        return length, value

    def _unit(self, index: int) -> int:
        if index >= len(self._units):
            raise wrong(self._gguf, KEY, f"has {len(self._units)} units and points at {index}")
        return self._units[index]


def _children(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _character_bytes(lead: int) -> int:
    """Length of the UTF-8 character that begins with this byte."""
    return 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
