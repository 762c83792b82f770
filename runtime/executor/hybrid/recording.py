"""A stream's work that is remembered instead of done, to be given to the stream again and again.

What differs between steps must lie in memory that does not move. Knows nothing about what the work is.
"""

from collections.abc import Callable
from functools import partial

import torch

from gpu_kernels.device import CostOf, Stream


class Recording:
    """Has the part of `Stream` that a step uses."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._work: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._work)

    def launch(self, call: Callable[[], None], cost: CostOf, name: str = "") -> None:
        """See `Stream`."""
        self._work.append(partial(self._stream.launch, call, cost, name))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Stream`."""
        self._work.append(partial(self._stream.copy, target, source))

    def call_host(self, address: int, argument: int) -> None:
        """See `Stream`."""
        self._work.append(partial(self._stream.call_host, address, argument))

    def replay(self) -> None:
        """Gives everything to the stream, in order. Raises what the stream raises."""
        for work in self._work:
            work()
