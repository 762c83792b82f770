"""Facts about this process that the system keeps."""

import sys

import psutil

if sys.platform != "win32":
    import resource


def peak_ram_bytes() -> int:
    """The most memory this process has held so far (peak resident set)."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
