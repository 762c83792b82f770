"""The manifest of a store: what it was made from, where each bundle lies, and the checksums.

Written as one JSON document that ends with a checksum of itself, read back strictly: a manifest in which a single bit
differs from what was written is refused. Knows nothing about models, nor how the data is written or read.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from offload.errors import FlashError, ModelFormatError
from offload.store_files import BLOCK_BYTES, MANIFEST_NAME
from offload.store_key import SourceIdentity, StoreKey

FORMAT_VERSION = 1
CODEC = "none"
MOST_BYTES = 256 << 20
REBUILD_HINT = "remove it with `strata store rm` and make it again with `strata pack`"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bundle:
    """Bytes that are read as one: at `offset`, a multiple of `BLOCK_BYTES`; up to the next multiple zeros follow."""

    name: str
    offset: int
    num_bytes: int
    checksum: int = 0  # XXH3, 64 bits

    @property
    def end(self) -> int:
        """Where the next bundle may begin."""
        return self.offset + whole_blocks(self.num_bytes)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a store holds."""

    key: StoreKey
    bundles: tuple[Bundle, ...]

    @property
    def data_bytes(self) -> int:
        """Length of the data file."""
        return self.bundles[-1].end if self.bundles else 0


def whole_blocks(num_bytes: int) -> int:
    """Rounded up to a multiple of `BLOCK_BYTES`."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def lay_out(bundles: Sequence[tuple[str, int]]) -> tuple[Bundle, ...]:
    """Places one after another for bundles' (name, bytes); ValueError for two of one name, or a size below 0."""
    placed: list[Bundle] = []
    for name, num_bytes in bundles:
        if num_bytes < 0:
            raise ValueError(f"bundle {name!r} of {num_bytes} bytes")
        placed.append(Bundle(name, placed[-1].end if placed else 0, num_bytes))
    if len({bundle.name for bundle in placed}) != len(placed):
        raise ValueError("two bundles have the same name")
    return tuple(placed)


def encode(manifest: Manifest) -> bytes:
    """The document."""
    document = {
        "format": FORMAT_VERSION,
        "codec": CODEC,
        "layout": manifest.key.layout,
        "sources": [list(astuple(source)) for source in manifest.key.sources],
        "data_bytes": manifest.data_bytes,
        "bundles": [list(astuple(bundle)) for bundle in manifest.bundles],
    }
    return _dumps({**document, "xxh3": xxhash.xxh3_64_intdigest(_dumps(document))})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in a folder.

    FlashError if it cannot be read, ModelFormatError if it is damaged or of another version.
    """
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise FlashError(
            f"{path}: the manifest cannot be read: {error.strerror or error}", hint="make it with `strata pack`"
        ) from error
    return decode(text, path)


def decode(text: bytes, path: Path) -> Manifest:
    """What `encode` wrote; ModelFormatError naming `path` for anything else."""
    try:
        document = json.loads(text)
        version = document["format"]
        if type(version) is not int or version == FORMAT_VERSION:
            return _decoded(document, text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelFormatError(f"{path}: the manifest is damaged: {reason}", hint=REBUILD_HINT) from error
    raise ModelFormatError(f"{path}: format {version} is not supported, {FORMAT_VERSION} is", hint=REBUILD_HINT)


def _decoded(document: dict[str, Any], text: bytes) -> Manifest:
    """ValueError or TypeError where the document is not what `encode` makes of the result."""
    checksum = document.pop("xxh3")
    if checksum != xxhash.xxh3_64_intdigest(_dumps(document)):
        raise ValueError("its checksum is wrong")
    if document["codec"] != CODEC:
        raise ValueError(f"codec {document['codec']!r} is not known")
    sources = tuple(_made(SourceIdentity, (str, str, int, int, int), row) for row in document["sources"])
    bundles = tuple(_made(Bundle, (str, int, int, int), row) for row in document["bundles"])
    if not sources or not isinstance(document["layout"], str):
        raise TypeError("it names no sources, or no layout")
    manifest = Manifest(StoreKey(sources, document["layout"]), bundles)
    if lay_out([(bundle.name, bundle.num_bytes) for bundle in bundles]) != tuple(
        Bundle(bundle.name, bundle.offset, bundle.num_bytes) for bundle in bundles
    ):
        raise ValueError("its bundles do not lie one after another")
    if encode(manifest) != text:
        raise ValueError("it is not as it was written")
    return manifest


def _made(kind: Callable[..., T], types: tuple[type, ...], row: Any) -> T:
    if not isinstance(row, list) or [type(value) for value in row] != list(types):
        raise TypeError(f"{str(row)[:80]} is not a {getattr(kind, '__name__', kind)}")
    return kind(*row)


def _dumps(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"
