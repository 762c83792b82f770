"""Runs a model as programs: tables of operations that a pool of threads goes through without Python in between.

Between two runs Python looks up the tokens' embeddings and sets a few parameters. Knows nothing about architectures'
names, plans or sampling. Invariants: a token's logits are the same, bit for bit, whatever else is computed beside it,
in chunks of any size and on any number of threads; caches change only when a whole call has succeeded.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offload.errors import UnsupportedModelError
from runtime.architectures.base import Model
from runtime.executor.base import LogitsWanted, Step, checked_caches
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.runner import CHUNK_TOKENS, MAX_LANES, Lane, Runner
from runtime.panels import PanelWeights


class ProgramExecutor:
    """Runs `model` with `weights`, which are loaded, on `threads` threads; caches hold float16."""

    def __init__(self, model: Model, weights: PanelWeights, *, threads: int = 1) -> None:
        """UnsupportedModelError for heads that the kernels do not know."""
        self.model = model
        try:
            self._runner = Runner(model, weights, threads)
        except ValueError as error:
            raise UnsupportedModelError(str(error), hint="run it with --loop sequential") from error

    def new_kv(self, capacity_tokens: int) -> ProgramKV:
        """See `Executor`."""
        model = self.model
        shape = (model.head_count_kv, model.key_length, model.value_length)
        return ProgramKV(model.block_count, *shape, capacity_tokens)

    def warm_up(self) -> None:
        """Make or load every kernel now, so that the first answer does not wait for them."""
        for count in (1, self._runner.few_tokens + 1):  # the two kinds of programs
            self.forward([Step([0] * count, self.new_kv(count))])

    def close(self) -> None:
        """See `Executor`."""
        self._runner.close()

    def forward(self, steps: Sequence[Step], *, logits: LogitsWanted = "last") -> list[NDArray[np.float32]]:
        """See `Executor`. Sequences that go on by one token are computed together."""
        caches = checked_caches(steps, ProgramKV, self.model.vocab_size)
        lanes = [Lane(step.token_ids, kv, kv.length) for step, kv in zip(steps, caches, strict=True)]
        results: dict[int, NDArray[np.float32]] = {}
        single = sorted(
            (index for index, lane in enumerate(lanes) if len(lane.token_ids) == 1),
            key=lambda index: lanes[index].kv.layout.capacity_tokens,  # so that fewer programs are needed
        )
        for first in range(0, len(single), MAX_LANES):
            together = single[first : first + MAX_LANES]
            rows = self._runner.run([lanes[index] for index in together], 0 if logits == "none" else len(together))
            for place, index in enumerate(together):
                results[index] = rows[place : place + 1] if logits != "none" else rows
        for index, lane in enumerate(lanes):
            if index not in results:
                results[index] = self._in_chunks(lane, logits)
        for lane in lanes:
            lane.kv.length = lane.stop
        return [results[index] for index in range(len(lanes))]

    def _in_chunks(self, lane: Lane, wanted: LogitsWanted) -> NDArray[np.float32]:
        """All tokens of a sequence."""
        parts = []
        for first in range(0, len(lane.token_ids), CHUNK_TOKENS):
            chunk = Lane(lane.token_ids[first : first + CHUNK_TOKENS], lane.kv, lane.start + first)
            is_last = chunk.stop == lane.stop
            logits_tokens = len(chunk.token_ids) if wanted == "all" else int(wanted == "last" and is_last)
            parts.append(self._runner.run([chunk], logits_tokens))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
