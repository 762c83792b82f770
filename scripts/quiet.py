"""What would disturb a measurement: other programs, whose use of the CPUs is told, and a run's own trials, left out.

Knows nothing about what is measured. A machine below this one's shows as stolen time where its system tells.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import psutil

from runtime import replan


@contextmanager
def planned_threads() -> Iterator[None]:
    """Within, runs keep their number of threads: where speed changes, trying others would be measured with the rest."""
    with patch.object(replan, "other_threads", return_value=()):
        yield


class Others:
    """From now on; `share` tells."""

    def __init__(self) -> None:
        self._began, self._used_s = time.perf_counter(), _others_s()

    def share(self) -> float:
        """Of all CPUs, what other programs have used until now."""
        possible_s = (time.perf_counter() - self._began) * (psutil.cpu_count() or 1)
        return max(_others_s() - self._used_s, 0.0) / possible_s


def _others_s() -> float:
    """Seconds of all CPUs that were neither idle nor this process's."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    counted_twice_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user and nice as well
    return float(sum(times) - idle_s - counted_twice_s - own.user - own.system)
