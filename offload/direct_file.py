"""A file that is read in whole blocks past the page cache. Knows nothing about who reads or when.

Short reads go on, EIO is tried again; `gguf_source.positional_read` is the seam for faults.
"""

import errno
import mmap
import os
import time

from offload import gguf_source
from offload.errors import FlashError
from offload.gguf_source import ByteSource

BLOCK_BYTES = 4096


class DirectFile:
    """A second descriptor of an open file, for reads of whole blocks that leave the page cache alone."""

    def __init__(self, source: ByteSource) -> None:
        """OSError where the file system cannot; FlashError if another file has taken the path."""
        self.source = source
        self._descriptor = os.open(source.path, os.O_RDONLY | os.O_DIRECT)
        if source.identity_of(self._descriptor) != source.identity:
            self.close()
            raise FlashError(f"{source.path}: the file was replaced while in use", hint="start again")
        try:
            with mmap.mmap(-1, BLOCK_BYTES) as block, memoryview(block) as view:
                gguf_source.positional_read(self._descriptor, view, 0)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._descriptor)

    def read_into(self, memory: memoryview, offset: int, needed: int) -> None:
        """Fills at least the first `needed` bytes of `memory`, which begins on a page, from a multiple of a block.

        FlashError if the drive fails for good, or the file ends early or changed.
        """
        done, failures = 0, 0
        while done < needed:
            try:
                count = gguf_source.positional_read(self._descriptor, memory[done:], offset + done)
                if count == 0:
                    self.source.check_identity()
                    end = f"the file ends at byte {offset + done}, {needed - done} more were expected"
                    raise FlashError(f"{self.source.path}: {end}", hint="download the file again")
                if done + count < needed and count < BLOCK_BYTES:
                    raise OSError(errno.EIO, "a read of less than a block")
            except OSError as error:
                failures += 1
                if error.errno != errno.EIO or failures > gguf_source.EIO_RETRIES:
                    raise FlashError(
                        f"{self.source.path}: reading at byte {offset + done} failed: {error.strerror or error}",
                        hint="check the drive and its cable (kernel log, SMART), then start again",
                    ) from error
                time.sleep(gguf_source.EIO_PAUSE_S * 2 ** (failures - 1))
                continue
            done += count
            if done < needed:
                done -= done % BLOCK_BYTES
        self.source.check_identity()
