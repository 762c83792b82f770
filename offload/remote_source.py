"""One model file on a server, of which the header is read: bytes at an offset, fetched in blocks that grow.

Knows nothing about HTTP but that runs of bytes can be asked for, nor about what they mean. Invariant: what it holds is
the file's beginning, without a gap, of one version: every reply is held against the first one's size and version.
Nothing beyond `MAX_HEADER_BYTES` is ever fetched: weights are read from local files.
"""

import threading

from offload.errors import FlashError, RequestError
from offload.gguf_cursor import MAX_HEADER_BYTES
from offload.http_range import RangeReply, read_range
from offload.remote_file import RemoteFile

FIRST_BLOCK_BYTES = 1 << 18  # four times as much with every block
LAST_BLOCK_BYTES = 1 << 22


class RemoteSource:
    """The beginning of a remote file; may be read from several threads at once."""

    def __init__(self, path: RemoteFile) -> None:
        """Fetches the first block; RequestError or FlashError as `read_range` says."""
        self.path = path
        self.closed = False
        self._lock = threading.Lock()
        self._block_bytes = FIRST_BLOCK_BYTES
        first = read_range(path, 0, self._block_bytes)
        self.size: int = first.size
        self._version = first.version
        self._held = bytearray(first.data)

    def close(self) -> None:
        """Frees what was fetched; reading afterwards is an error. May be called twice."""
        with self._lock:
            self.closed = True
            self._held = bytearray()

    def check_identity(self) -> None:
        """FlashError if the file on the server is another one than at opening."""
        self._checked(read_range(self.path, 0, 1))

    def read_into(self, destination: memoryview, offset: int) -> None:
        """Fills `destination` (contiguous bytes) from byte `offset`, fetching what is not held yet.

        FlashError if the server fails, or the file ends early or changed; RequestError beyond the header.
        """
        end = offset + len(destination)
        with self._lock:
            if self.closed:
                raise FlashError(f"{self.path}: read after the file was closed")
            if end > MAX_HEADER_BYTES:
                raise RequestError(
                    f"{self.path}: only the header of a file on a server is read",
                    hint=f"download it first: {self.path.download_command}",
                )
            if end > self.size:
                raise FlashError(
                    f"{self.path}: the file ends at byte {self.size}, {end - self.size} more were expected"
                )
            while len(self._held) < end:
                self._fetch(end)
            destination[:] = memoryview(self._held)[offset:end]

    def _fetch(self, end: int) -> None:
        """Goes on where the held bytes end: to `end`, or a block where that is more."""
        start = len(self._held)
        self._block_bytes = min(4 * self._block_bytes, LAST_BLOCK_BYTES)
        most = min(self.size, MAX_HEADER_BYTES) - start
        self._held += self._checked(read_range(self.path, start, min(max(end - start, self._block_bytes), most))).data

    def _checked(self, reply: RangeReply) -> RangeReply:
        """`reply`; FlashError where it is of another version of the file."""
        if (reply.size, reply.version) == (self.size, self._version):
            return reply
        change = f"{self.size} bytes at first, {reply.size} now" if reply.size != self.size else "it was replaced"
        raise FlashError(
            f"{self.path}: the file changed on the server while it was read ({change})", hint="start again"
        )
