"""The folder in which stores lie: their names, a listing, and removal. Knows nothing about models."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from offload.errors import FlashError, ModelFormatError
from offload.gguf_shards import SHARD_NAME
from offload.store_files import DATA_NAME, FILES, JOURNAL_NAME, MANIFEST_NAME, PARTIAL_SUFFIX, Files
from offload.store_journal import is_held
from offload.store_key import SourceIdentity, StoreKey
from offload.store_manifest import Manifest, read_manifest

MOST_NAME_BYTES = 120


class StoreState(StrEnum):
    """What can be done with a store."""

    READY = "ready"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"
    SOURCE_GONE = "source gone"
    SOURCE_CHANGED = "source changed"


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """A store as the listing shows it; `num_bytes` on the drive, `source` the path of the file it was made from."""

    name: str
    folder: Path
    num_bytes: int
    state: StoreState
    source: Path | None = None


def store_folder(root: Path, key: StoreKey) -> Path:
    """Where the store of that key lies, or would lie, among those in `root`."""
    name = key.sources[0].name
    shard = SHARD_NAME.fullmatch(name)
    stem = shard["stem"] if shard else name.removesuffix(".gguf")
    short = stem.encode(errors="surrogateescape")[:MOST_NAME_BYTES].decode(errors="ignore")
    return root / f"{short}-{key.digest}"


def list_stores(root: Path) -> tuple[StoreEntry, ...]:
    """All stores in a folder, by name, finished or not; none where there is no folder; FlashError."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        return tuple(_entry(folder) for folder in folders if _is_store(folder))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise FlashError(f"{root}: cannot be listed: {error.strerror}", hint="check the folder's rights") from error


def remove_store(entry: StoreEntry, files: Files = FILES) -> None:
    """Removes a store, finished or not; FlashError if that fails, or a process is building it."""
    try:
        if is_held(entry.folder / JOURNAL_NAME):
            raise FlashError(f"{entry.folder}: another process is building this store", hint="end it first")
        files.remove_store(entry.folder)
    except OSError as error:
        raise FlashError(
            f"{entry.folder}: cannot be removed: {error.strerror}", hint="check the folder's rights"
        ) from error


def _is_store(folder: Path) -> bool:
    named = re.search(rf"-[0-9a-f]{{12}}({re.escape(PARTIAL_SUFFIX)})?$", folder.name) is not None
    return named or (folder / MANIFEST_NAME).is_file()


def _entry(folder: Path) -> StoreEntry:
    num_bytes = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    if folder.name.endswith(PARTIAL_SUFFIX):
        return StoreEntry(folder.name, folder, num_bytes, StoreState.UNFINISHED)
    try:
        manifest = read_manifest(folder)
    except (FlashError, ModelFormatError):
        return StoreEntry(folder.name, folder, num_bytes, StoreState.DAMAGED)
    return StoreEntry(folder.name, folder, num_bytes, _state(folder, manifest), manifest.key.sources[0].path)


def _state(folder: Path, manifest: Manifest) -> StoreState:
    data = folder / DATA_NAME
    if not data.is_file() or data.stat().st_size != manifest.data_bytes:
        return StoreState.DAMAGED
    states = [_source_state(source) for source in manifest.key.sources]
    return next((state for state in states if state is not StoreState.READY), StoreState.READY)


def _source_state(source: SourceIdentity) -> StoreState:
    try:
        status = source.path.stat()
    except OSError:
        return StoreState.SOURCE_GONE
    same = (status.st_size, status.st_mtime_ns) == (source.num_bytes, source.mtime_ns)
    return StoreState.READY if same else StoreState.SOURCE_CHANGED
