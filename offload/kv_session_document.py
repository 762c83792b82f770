"""What a saved session is besides its KV: the model it was computed by, its messages and its tokens, in one document.

JSON with a checksum of itself, written as a whole or not at all and read back strictly: a document in which a single
bit differs from what was written is refused. Knows nothing about templates or models.
"""

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import xxhash

from offload.errors import FlashError
from offload.store_files import PARTIAL_SUFFIX, Files, replace_file
from offload.store_key import SourceIdentity, StoreKey

DOCUMENT_NAME = "session.json"
FORMAT_VERSION = 1
MOST_BYTES = 256 << 20
REMOVE_HINT = "remove it with `strata session rm`, or use another name"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SessionDocument:
    """`key` tells the model and how its KV was computed, `token_ids` are those that the KV holds."""

    key: StoreKey
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]


def read_document(folder: Path) -> SessionDocument | None:
    """The document in a folder, None where there is none; FlashError if it cannot be read or is not sound."""
    path = folder / DOCUMENT_NAME
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FlashError(f"{path}: cannot be read: {error.strerror or error}", hint="check its rights") from error
    return decode(text, path)


def write_document(folder: Path, document: SessionDocument, files: Files) -> None:
    """Puts it in place of the one in the folder, which stays until this one is on the drive; OSError."""
    path = folder / DOCUMENT_NAME
    replace_file(files, path, encode(document), path.with_name(DOCUMENT_NAME + PARTIAL_SUFFIX))
    files.sync_folder(folder)


def encode(document: SessionDocument) -> bytes:
    """As JSON."""
    content = {
        "format": FORMAT_VERSION,
        "layout": document.key.layout,
        "sources": [list(astuple(source)) for source in document.key.sources],
        "messages": list(document.messages),
        "token_ids": list(document.token_ids),
    }
    return _dumps({**content, "xxh3": xxhash.xxh3_64_intdigest(_dumps(content))})


def decode(text: bytes, path: Path) -> SessionDocument:
    """What `encode` wrote; FlashError naming `path` for anything else."""
    try:
        content = json.loads(text)
        version = content["format"]
        if type(version) is not int or version == FORMAT_VERSION:
            return _decoded(content, text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise FlashError(f"{path}: the session is damaged: {reason}", hint=REMOVE_HINT) from error
    raise FlashError(
        f"{path}: format {version} is not supported, {FORMAT_VERSION} is",
        hint="run the version of strata that wrote it, or use another name",
    )


def _decoded(content: dict[str, Any], text: bytes) -> SessionDocument:
    """ValueError, KeyError or TypeError where it is not what `encode` makes of the result."""
    checksum = content.pop("xxh3")
    if checksum != xxhash.xxh3_64_intdigest(_dumps(content)):
        raise ValueError("its checksum is wrong")
    sources = tuple(SourceIdentity(*source) for source in content["sources"])
    document = SessionDocument(
        StoreKey(sources, content["layout"]), tuple(content["messages"]), tuple(content["token_ids"])
    )
    if encode(document) != text:
        raise ValueError("it is not as it was written")
    return document


def _dumps(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
