"""A session with a name: a conversation and its KV, which stay on flash until they are removed.

One process uses a session at a time. Order of the writes: blocks of KV as answers end, then the document that tells
what was said, in place of the old one, then the removal of blocks that it does not need: a session that was killed in
between opens as it was before. Knows nothing of terminals or templates.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from offload.closing import Closing, closed_on_error
from offload.errors import FlashError, RequestError
from offload.kv_session_document import Message, SessionDocument, read_document, write_document
from offload.kv_session_folder import BlockFolder
from offload.kv_session_lock import NamedLock
from offload.store_files import FILES, Files
from offload.store_key import StoreKey
from runtime.executor.base import KVHandle
from runtime.session import Session
from runtime.session_rows import KeptRows, RowsKeys

log = logging.getLogger("strata.session")

LOCK_NAME = "lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def sessions_folder() -> Path:
    """Where sessions lie: `$XDG_DATA_HOME/strata/sessions`, by default under `~/.local/share`."""
    base = os.environ.get("XDG_DATA_HOME", "")
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "share"
    return folder / "strata" / "sessions"


def checked_name(name: str) -> str:
    """The name, which must be one that a folder can have; RequestError."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name!r} cannot name a session", hint="use up to 64 letters, digits, dots, hyphens and underscores"
        )
    return name


class SavedSession(Closing):
    """The session of that name among those in `root`, held against other processes until it is closed.

    `document` is what was saved, None for a new session. It is a `session.RowsSource` once it is used.
    """

    def __init__(self, name: str, root: Path | None = None, *, files: Files = FILES) -> None:
        """RequestError where another process uses it or the name cannot be used; FlashError where it is not sound."""
        self.name = checked_name(name)
        self.folder = (root or sessions_folder()) / name
        self._files = files
        self._blocks = BlockFolder(self.folder, files=files)
        self._keys: RowsKeys | None = None
        self._rows: KeptRows | None = None
        try:
            files.make_folder(self.folder)
            self.folder.chmod(0o700)
        except OSError as error:
            raise FlashError(
                f"{self.folder}: cannot be made: {error.strerror or error}", hint="check the rights of the folder above"
            ) from error
        self._lock = NamedLock(self.folder / LOCK_NAME, f"session {name}")
        with closed_on_error(self._lock):
            self.document = read_document(self.folder)

    def use(self, keys: RowsKeys, kv: KVHandle, also: Sequence[BlockFolder] = ()) -> str | None:
        """From now on rows come from here, or else from the folders `also`, and go here.

        Returns why the session's rows cannot be used, in words; None if they can be.
        """
        self._keys = keys
        self._rows = KeptRows(keys, [self._blocks, *also], f"session {self.name}")
        key = keys.of(kv)
        if key is None:
            return "KV of this loop cannot be saved"
        if self.document is None or self.document.key == key:
            return None
        return "; ".join(self.document.key.differences(key))

    def restore(self, kv: KVHandle, token_ids: Sequence[int], held: int) -> int:
        """See `session.RowsSource`."""
        return held if self._rows is None else self._rows.restore(kv, token_ids, held)

    def keep(self, kv: KVHandle, token_ids: Sequence[int], _prompt_tokens: int) -> None:
        """See `session.RowsSource`: all rows."""
        if self._rows is not None:
            self._rows.write(kv, token_ids)

    def save(self, messages: Sequence[Message], session: Session) -> None:
        """Makes this the session's state, with the rows that were kept; FlashError, then the state is the old one."""
        if self._keys is None or self._rows is None:
            raise ValueError("a session is saved before it is used")
        key = self._keys.of(session.kv)
        tokens = session.token_ids[: session.kv.length]
        document = SessionDocument(key or StoreKey((), "no KV"), tuple(messages), tuple(tokens if key else ()))
        try:
            write_document(self.folder, document, self._files)
        except OSError as error:
            raise FlashError(
                f"{self.folder}: the session cannot be saved: {error.strerror or error}",
                hint="free some space on this drive, or check the folder's rights",
            ) from error
        self.document = document
        self._blocks.keep_only(self._rows.digests(session.kv, tokens))

    def close(self) -> None:
        """Lets others use it; a session that was never saved is gone. May be called twice."""
        if self.document is None and not self._lock.closed:
            try:
                self._blocks.keep_only(())
                (self.folder / LOCK_NAME).unlink(missing_ok=True)
                self.folder.rmdir()
            except (OSError, FlashError) as error:
                log.warning("%s is not removed: %s", self.folder, error)
        self._lock.close()
