"""How far two sets of logits are apart."""

import numpy as np
from numpy.typing import NDArray

# nats; the peer rounds activations to 16 bits for F16 matrices and to 8 bits for all but F32 and F16
EXACT_TYPES = ("F32", "F16")
MAX_KL = {True: 1e-4, False: 1e-2}
MAX_KL_OF_FLOATS = 2e-6  # sums in another order alone; the greatest found was 2e-7


def kl_divergences(peer: NDArray[np.floating], ours: NDArray[np.floating]) -> NDArray[np.float64]:
    """The KL divergence of our distribution from the peer's at every position, in nats; (n, vocab) each."""
    p, q = _log_softmax(peer), _log_softmax(ours)
    divergences: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return divergences


def max_kl_divergence(peer: NDArray[np.floating], ours: NDArray[np.floating]) -> float:
    """The greatest of `kl_divergences`."""
    return float(kl_divergences(peer, ours).max())


def decided_differently(peer: NDArray[np.floating], ours: NDArray[np.floating], gap: float = 1e-2) -> list[int]:
    """Positions where the peer's best token leads by more than `gap` and ours is another."""
    top = np.sort(peer, axis=-1)
    clear = top[:, -1] - top[:, -2] > gap
    return np.flatnonzero(clear & (peer.argmax(-1) != ours.argmax(-1))).tolist()


def check_close(peer: NDArray[np.floating], ours: NDArray[np.floating], quant_type: str) -> None:
    """Fails unless ours are as close to the peer's as a model of that type must be."""
    exact = quant_type in EXACT_TYPES
    divergence = max_kl_divergence(peer, ours)
    assert divergence <= MAX_KL[exact], f"KL divergence {divergence:.2e}"
    if exact:
        assert decided_differently(peer, ours) == []


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
