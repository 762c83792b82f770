"""The largest memory a process ever held, for tests that run one of their own (Linux)."""

from pathlib import Path


def peak_bytes() -> int:
    """Peak resident set of this process; unlike `ru_maxrss`, nothing of the parent is counted."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10
