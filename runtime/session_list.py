"""The sessions that there are: what a listing shows of each, and their removal. Knows nothing about models."""

from dataclasses import dataclass
from pathlib import Path

from offload.errors import FlashError
from offload.kv_session_document import DOCUMENT_NAME, SessionDocument, read_document
from offload.kv_session_folder import BlockFolder
from offload.kv_session_lock import NamedLock, holder
from offload.store_files import FILES, Files
from runtime.session_saved import LOCK_NAME


@dataclass(frozen=True, slots=True)
class SessionEntry:
    """A session of a listing. `num_bytes` on the drive, `used_s`: when it was saved, in seconds since 1970.

    `holder`: the process that uses it; `fault`: why it cannot be opened.
    """

    name: str
    folder: Path
    num_bytes: int
    used_s: float
    document: SessionDocument | None = None
    holder: str | None = None
    fault: str | None = None

    @property
    def state(self) -> str:
        """In words."""
        if self.holder is not None:
            return f"in use by {self.holder}"
        return "damaged" if self.fault is not None else "new" if self.document is None else "ready"

    @property
    def model(self) -> str:
        """The file of the model that it was computed by; empty where that is not known."""
        sources = self.document.key.sources if self.document is not None else ()
        return sources[0].name if sources else ""


def list_sessions(root: Path) -> tuple[SessionEntry, ...]:
    """All sessions in a folder, by name; none where there is no folder; FlashError."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        return tuple(_entry(folder) for folder in folders)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise FlashError(f"{root}: cannot be listed: {error.strerror}", hint="check the folder's rights") from error


def remove_session(entry: SessionEntry, files: Files = FILES) -> None:
    """Removes a session; RequestError if a process uses it, FlashError."""
    with NamedLock(entry.folder / LOCK_NAME, f"session {entry.name}"):
        try:
            (entry.folder / DOCUMENT_NAME).unlink(missing_ok=True)
            BlockFolder(entry.folder, files=files).keep_only(())
            for path in entry.folder.iterdir():
                files.remove(path)
            entry.folder.rmdir()
        except OSError as error:
            raise FlashError(
                f"{entry.folder}: cannot be removed: {error.strerror}", hint="check the folder's rights"
            ) from error


def _entry(folder: Path) -> SessionEntry:
    statuses = [path.stat() for path in folder.iterdir()]
    num_bytes = sum(status.st_blocks * 512 for status in statuses)
    fault, document = None, None
    try:
        document = read_document(folder)
    except FlashError as error:
        fault = str(error)
    path = folder / DOCUMENT_NAME
    used_s = path.stat().st_mtime if path.exists() else folder.stat().st_mtime
    return SessionEntry(folder.name, folder, num_bytes, used_s, document, holder(folder / LOCK_NAME), fault)
