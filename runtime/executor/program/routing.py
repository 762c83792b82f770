"""What a layer's router decided in a run: ids and weights of the experts of every token. Knows nothing of programs."""

import numpy as np
from numpy.typing import NDArray

from runtime.executor.program.workspace import Workspace


class Routing:
    """Memory for `pairs` pairs of a token and an expert: that of one layer, or with None that of all in turn."""

    def __init__(self, workspace: Workspace, pairs: int, layer: int | None) -> None:
        suffix = "" if layer is None else f"_{layer}"
        self.ids: NDArray[np.int32] = workspace.integer_array(f"topk_ids{suffix}", pairs)
        self.weights: NDArray[np.float32] = workspace.array(f"topk_weights{suffix}", 1, pairs)[0]
