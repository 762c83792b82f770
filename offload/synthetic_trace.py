"""Routing traces made up for tests and experiments: popularity as in Zipf's law, and reuse of the last token's experts.

Knows nothing about real models: what a trace of one says is to be preferred.
"""

import numpy as np

from offload.routing_trace import RoutingTrace


def synthetic_trace(
    layers: int,
    experts: int,
    used: int,
    tokens: int,
    *,
    zipf_exponent: float = 1.0,
    reuse: float = 0.0,
    seed: int = 0,
) -> RoutingTrace:
    """One sequence in which the expert of rank r is drawn in proportion to (r + 1) ** -zipf_exponent.

    Ranks are dealt anew in every layer. Each expert of the last token is used again with probability `reuse`; the rest
    are drawn without replacement. Weights fall from the most popular of a token's experts to the least.
    """
    if not 0.0 <= reuse <= 1.0:
        raise ValueError(f"reuse {reuse} is no probability")
    random = np.random.default_rng(seed)
    log_popularity = -zipf_exponent * np.log(np.arange(1, experts + 1))
    log_weight = np.stack([random.permutation(log_popularity) for _ in range(layers)])
    ids = np.empty((tokens, layers, used), np.int16)
    layer = np.arange(layers)[:, None]
    for token in range(tokens):
        # the greatest of log weight + Gumbel noise: a draw without replacement
        keys = log_weight + random.gumbel(size=(layers, experts))
        if token:
            last = ids[token - 1].astype(np.int64)  # (layers, used)
            again = random.random(last.shape) < reuse
            keys[np.broadcast_to(layer, last.shape)[again], last[again]] = np.inf
        ids[token] = np.argpartition(-keys, used - 1, axis=1)[:, :used] if used < experts else np.arange(experts)
    popularity = np.exp(log_weight[layer[None], ids.astype(np.int64)])
    weights = (popularity / popularity.sum(axis=2, keepdims=True)).astype(np.float32)
    return RoutingTrace("synthetic", experts, ids, np.zeros(min(tokens, 1), np.int64), weights)
