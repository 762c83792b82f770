"""Memory from the system, in large or small pages. Knows nothing about what is put there."""

import mmap
import sys

import numpy as np
from numpy.typing import NDArray


def reserved_bytes(num_bytes: int, *, huge_pages: bool) -> NDArray[np.uint8]:
    """Zeroed memory that begins on a page; a page takes RAM when it is first written.

    `huge_pages`: asks for pages of 2 MiB where the system has them; else for the smallest, so that memory which is
    written in places takes little more than those.
    """
    size = max(num_bytes, 1)
    if sys.platform == "win32":
        memory = mmap.mmap(-1, size)
    else:  # private: the system gives huge pages to shared memory by another rule
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge_pages else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        memory.madvise(advice)
    return np.frombuffer(memory, np.uint8)
