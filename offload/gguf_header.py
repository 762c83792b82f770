"""The header of one GGUF file, versions 2 and 3, little-endian: metadata and the table of tensors.

Knows nothing about shards, architectures or reading weights. Strict: what the format does not allow is refused with
the file and byte it stands at, before anything is allocated for it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cpu_kernels.quant_types import QUANT_TYPES, unknown_quant_type
from offload.errors import ModelFormatError
from offload.gguf_cursor import HeaderCursor
from offload.gguf_tensors import MAX_DIMENSIONS, TensorEntry, TensorInfo, check_entry, lay_out
from offload.gguf_values import UINT32, Metadata, MetadataValue, Text
from offload.source import Source

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 1024
MAX_TENSOR_NAME_BYTES = 128
LEAST_KEY_BYTES = 8 + 1 + 4 + 1  # name length, name, type, value
LEAST_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # name length, name, number of dimensions, type, offset
ALIGNMENT_KEY = "general.alignment"
_SHAPE_TYPE_OFFSET = [struct.Struct(f"<{dimensions}QIQ") for dimensions in range(MAX_DIMENSIONS + 1)]

FOREIGN_STARTS: Mapping[bytes, tuple[str, str]] = {
    b"FUGG": ("a big-endian GGUF file", "convert the model for a little-endian machine"),
    b"lmgg": ("a GGML file from before GGUF", "download a GGUF conversion of this model"),
    b"fmgg": ("a GGML file from before GGUF", "download a GGUF conversion of this model"),
    b"tjgg": ("a GGML file from before GGUF", "download a GGUF conversion of this model"),
    b"PK\x03\x04": ("a zip archive (PyTorch weights?)", "download a GGUF conversion of this model"),
    b"vers": ("a Git LFS pointer, not the model itself", "fetch the model with `git lfs pull` or download it"),
    b"<!DO": ("a web page, not a model", "download the file itself, not the page that describes it"),
    b"<htm": ("a web page, not a model", "download the file itself, not the page that describes it"),
}


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What one file says: `tensors` in the table's order, `data_start` the first byte of the data section."""

    version: int
    alignment: int
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    data_start: int


def read_header(source: Source, shard: int) -> GGUFHeader:
    """Parses the header; ModelFormatError names the byte at fault, FlashError a drive or server that fails."""
    cursor = HeaderCursor(source)
    version = _read_version(cursor)
    num_tensors = _read_count(cursor, "tensors", LEAST_TENSOR_BYTES, MAX_TENSORS)
    num_keys = _read_count(cursor, "metadata keys", LEAST_KEY_BYTES, MAX_KEYS)
    values, alignment = _read_metadata(cursor, num_keys)
    entries = _read_entries(cursor, num_tensors, alignment)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = lay_out(source.path, shard, entries, data_start, source.size)
    return GGUFHeader(version, alignment, Metadata(values), tensors, data_start)


def _read_version(cursor: HeaderCursor) -> int:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        kind, hint = FOREIGN_STARTS.get(
            bytes(magic), (f"not a GGUF file (it begins with {bytes(magic)!r})", "give a .gguf file")
        )
        raise ModelFormatError(f"{cursor.path}: byte 0: this is {kind}", hint=hint)
    version = cursor.u32("the version")
    if version in VERSIONS:
        return version
    if version and version & 0xFFFF == 0:
        raise cursor.broken("the file is big-endian", 4, hint="convert the model for a little-endian machine")
    known = " and ".join(map(str, VERSIONS))
    if version == 1:
        hint = "download a newer conversion of this model"
    else:
        hint = "update strata, or download the file again if it is damaged"
    raise cursor.broken(f"GGUF version {version} is not supported, {known} are", 4, hint=hint)


def _read_count(cursor: HeaderCursor, what: str, least_bytes: int, most: int) -> int:
    count = cursor.u64(f"the number of {what}")
    if count * least_bytes > cursor.remaining:
        raise cursor.broken(
            f"{count} {what} need {count * least_bytes} bytes or more, {cursor.remaining} remain in the file",
            cursor.position - 8,
        )
    if count > most:
        raise cursor.broken(f"{count} {what}, more than {most}, the most allowed", cursor.position - 8)
    return count


def _read_metadata(cursor: HeaderCursor, count: int) -> tuple[dict[str, MetadataValue | Text], int]:
    """All values by key, and the alignment they set."""
    values: dict[str, MetadataValue | Text] = {}
    alignment = DEFAULT_ALIGNMENT
    for index in range(count):
        start = cursor.position
        key = cursor.name(f"metadata key {index}", MAX_KEY_BYTES)
        if key in values:
            raise cursor.broken(f"metadata key {key!r} stands there a second time", start)
        kind, value = cursor.value(key)
        if key == ALIGNMENT_KEY:
            alignment = _checked_alignment(cursor, kind, value, start)
        values[key] = value
    return values, alignment


def _checked_alignment(cursor: HeaderCursor, kind: int, value: object, start: int) -> int:
    if kind != UINT32 or not isinstance(value, int):
        raise cursor.broken(f"{ALIGNMENT_KEY} has value type {kind}, it must be uint32 ({UINT32})", start)
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.broken(f"{ALIGNMENT_KEY} is {value}, it must be a power of two up to {MAX_ALIGNMENT}", start)
    return value


def _read_entries(cursor: HeaderCursor, count: int, alignment: int) -> list[TensorEntry]:
    entries: list[TensorEntry] = []
    names: set[str] = set()
    for index in range(count):
        entry = _read_entry(cursor, index)
        if entry.name in names:
            raise cursor.broken(f"tensor {entry.name!r} stands there a second time", entry.position)
        check_entry(cursor.path, entry, alignment)
        names.add(entry.name)
        entries.append(entry)
    return entries


def _read_entry(cursor: HeaderCursor, index: int) -> TensorEntry:
    position = cursor.position
    name = cursor.name(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    dimensions = cursor.u32(f"the number of dimensions of tensor {name!r}")
    if dimensions > MAX_DIMENSIONS:
        raise cursor.broken(
            f"tensor {name!r} has {dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed", cursor.position - 4
        )
    *sizes, type_id, offset = cursor.numbers(_SHAPE_TYPE_OFFSET[dimensions], f"the table entry of tensor {name!r}")
    quant_type = QUANT_TYPES.get(type_id) or unknown_quant_type(type_id)
    return TensorEntry(name, quant_type, tuple(reversed(sizes)), offset, position)
