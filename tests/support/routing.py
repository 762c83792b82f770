"""How close a model's routers were to choosing otherwise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runtime.executor import layers
from tests.support import running


def router_gaps(path: Path, ids: Sequence[int]) -> NDArray[np.float32]:
    """The least distance, over the blocks, of the last chosen expert's router logit from the next one's: (tokens,).

    Infinite for a model without experts. Where it is small, rounding activations may move a token to another expert,
    and then its logits say nothing about the arithmetic.
    """
    gaps: list[torch.Tensor] = [torch.full((len(ids),), torch.inf)]
    choose = layers.choose_experts

    def watched(
        router_logits: torch.Tensor, used: int, *, norm: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if used < router_logits.shape[-1]:
            falling = router_logits.sort(dim=-1, descending=True).values
            gaps.append(falling[:, used - 1] - falling[:, used])
        return choose(router_logits, used, norm=norm, scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "choose_experts", watched)
        running.logits_of(path, ids)
    least: NDArray[np.float32] = torch.stack(gaps).amin(0).numpy()
    return least
