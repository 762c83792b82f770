"""Steps of few tokens as one piece of work (a CUDA graph), once it was seen that nothing changes by that.

A step that comes again is done as a graph and then as always, and both must give the same logits to the bit; if
anything goes wrong, graphs are not used any more, which is logged once. Knows nothing about what a step computes.
"""

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gpu_kernels.device import Stream
from runtime.executor.hybrid.recording import Recording
from runtime.executor.hybrid.step_inputs import StepShape

log = logging.getLogger("strata.hybrid")

MOST_TOKENS = 32  # of a lane: longer parts of prompts keep the host waiting anyway
USES_BEFORE = 2  # of a shape


class StepGraphs:
    """Decides which recordings of a stream become graphs."""

    def __init__(self, stream: Stream) -> None:
        self._can_capture = stream.can_capture

    def wants(self, recording: Recording, shape: StepShape) -> bool:
        """Whether a step that is about to be done is to become a graph."""
        few = shape.tokens <= MOST_TOKENS * shape.lanes
        return self._can_capture and few and not recording.is_captured and recording.uses >= USES_BEFORE

    def try_one(self, recording: Recording, do: Callable[[], None], logits: NDArray[np.float32]) -> None:
        """`do` does a step anew, from its tokens; `logits` (n, vocab) are what it finds. Errors of the second time.

        The graph comes first: what it leaves undone cannot have been done before.
        """
        try:
            recording.capture()
            recording.as_graph = True
            do()
            found = logits.copy()
        except Exception as error:  # noqa: BLE001 - whatever this is, there is another way
            self._turn_off(recording, error)
            do()
            return
        recording.as_graph = False
        do()
        if np.array_equal(logits.view(np.uint32), found.view(np.uint32)):
            recording.as_graph = True
        else:
            self._turn_off(recording, RuntimeError("its logits are others"))

    def _turn_off(self, recording: Recording, error: Exception) -> None:
        self._can_capture = False
        recording.drop_graph()
        log.warning("steps are given to the GPU piece by piece: one as a CUDA graph failed: %s", error)
