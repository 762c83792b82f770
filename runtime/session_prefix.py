"""The prefix cache: rows of prompts that later prompts may begin with, kept on flash within a limit.

Two rules say which are worth their bytes: of a conversation the first prompt, since another one may begin as it did;
of a batch what two prompts have in common. Those used longest ago are evicted. Knows nothing of text.
"""

from collections.abc import Sequence
from enum import StrEnum

from offload.kv_session_folder import BlockFolder
from planner.folders import cache_folder
from runtime.executor.base import KVHandle
from runtime.executor.saved_rows import SavedRows
from runtime.session_rows import KeptRows, RowsKeys

DEFAULT_LIMIT = "8GiB"


class Worth(StrEnum):
    """Which prompts' rows are kept."""

    FIRST = "first"  # of those that begin with an empty cache
    SHARED = "shared"  # what two have in common


def prefix_folder(most_bytes: int) -> BlockFolder:
    """Where rows of prefixes lie."""
    return BlockFolder(cache_folder() / "prefixes", most_bytes=most_bytes)


class PrefixCache:
    """A `session.RowsSource` of prefixes in `folder`."""

    def __init__(self, keys: RowsKeys, folder: BlockFolder, worth: Worth) -> None:
        self._rows = KeptRows(keys, [folder], "prefix cache")
        self._worth = worth
        self._begins = False
        self._seen: set[bytes] = set()
        self._shared: set[bytes] = set()

    def restore(self, kv: KVHandle, token_ids: Sequence[int], held: int) -> int:
        """See `KeptRows`."""
        self._begins = held == 0
        if self._worth is Worth.SHARED:
            digests = self._rows.digests(kv, token_ids)
            self._shared.update(self._seen.intersection(digests))
            self._seen.update(digests)
        return self._rows.restore(kv, token_ids, held)

    def keep(self, kv: KVHandle, token_ids: Sequence[int], prompt_tokens: int) -> None:
        """Keeps the rows of the prompt that are worth it."""
        prompt = token_ids[:prompt_tokens]
        if self._worth is Worth.FIRST:
            if self._begins:
                self._rows.write(kv, prompt)
            return
        shared = sum(digest in self._shared for digest in self._rows.digests(kv, prompt))
        if shared and isinstance(kv, SavedRows):
            self._rows.write(kv, prompt[: shared * kv.rows_layout.block_tokens])
