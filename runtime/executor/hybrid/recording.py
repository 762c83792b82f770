"""A stream's work that is remembered instead of done, to be given to the stream again and again.

What differs between steps must lie in memory that does not move. Knows nothing about what the work is.
"""

from collections.abc import Callable

import torch

from gpu_kernels.device import CallHost, Copy, CostOf, Launch, Stream, Work


class Recording:
    """Has the part of `Stream` that a step uses."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._work: list[Work] = []
        self._give: Callable[[], None] | None = None
        self._graph: Callable[[], None] | None = None
        self.uses = 0  # how often it was replayed
        self.as_graph = False  # whether what was captured is given

    def __len__(self) -> int:
        return len(self._work)

    def launch(self, call: Callable[[], None], cost: CostOf, name: str = "") -> None:
        """See `Stream`."""
        self._work.append(Launch(call, cost, name))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Stream`."""
        self._work.append(Copy(target, source))

    def call_host(self, address: int, argument: int) -> None:
        """See `Stream`."""
        self._work.append(CallHost(address, argument))

    def replay(self) -> None:
        """Gives everything to the stream, in order; nothing is recorded any more. Raises what the stream raises."""
        self.uses += 1
        if self.as_graph and self._graph is not None:
            self._graph()
            return
        if self._give is None:
            self._give = self._stream.prepare(self._work)
        self._give()

    @property
    def is_captured(self) -> bool:
        """Whether it can be given as one piece."""
        return self._graph is not None

    def capture(self) -> None:
        """From now on it can be given as one piece. Errors of `Stream.capture`; ValueError if it was never replayed."""
        if self._give is None:
            raise ValueError("what was never done cannot be captured: kernels are compiled and memory is had before")
        self._graph = self._stream.capture(self._give)

    def drop_graph(self) -> None:
        """Frees what was captured; it is given piece by piece again."""
        self._graph, self.as_graph = None, False
