"""Which of this machine's CPUs are performance cores. Knows nothing of threads' work.

Linux tells by `cpu_capacity` (ARM) or by the highest frequency; elsewhere nothing is known and nothing is pinned.
"""

import os
from pathlib import Path

_SYSTEM = Path("/sys/devices/system/cpu")
_SLOW = 0.8  # favoured cores of one kind differ by a few percent, kinds of cores by a quarter or more


def allowed_cpus() -> frozenset[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def performance_cpus(system: Path = _SYSTEM) -> frozenset[int] | None:
    """The fast ones of the CPUs that this process may use; None where they do not differ or nothing is known."""
    allowed = allowed_cpus()
    for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        speeds = {cpu: _number(system / f"cpu{cpu}" / file) for cpu in allowed}
        if all(speeds.values()):
            fast = frozenset(cpu for cpu, speed in speeds.items() if speed >= _SLOW * max(speeds.values()))
            return fast if fast != allowed else None
    return None


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0
