"""Two sequences of equal parts that lie one after the other in memory, and in pairs in a file.

So what belongs together is read at once. Knows nothing about what the parts hold.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pairs:
    """`count` parts of `first_bytes`, and behind them as many of `second_bytes`."""

    count: int
    first_bytes: int
    second_bytes: int

    @property
    def pair_bytes(self) -> int:
        """Bytes of a part and its other."""
        return self.first_bytes + self.second_bytes

    @property
    def seconds_start(self) -> int:
        """Where the second parts begin in memory."""
        return self.count * self.first_bytes

    def put_together(self, memory: Bytes, file: Bytes) -> None:
        """From memory to the bytes of a file; what lies behind the pairs stays there."""
        paired = self._paired(file)
        paired[:, : self.first_bytes], paired[:, self.first_bytes :] = self._parts(memory)
        file[self.count * self.pair_bytes :] = memory[self.count * self.pair_bytes :]

    def take_apart(self, file: Bytes, memory: Bytes) -> None:
        """From the bytes of a file to memory."""
        firsts, seconds = self._parts(memory)
        paired = self._paired(file)
        firsts[:], seconds[:] = paired[:, : self.first_bytes], paired[:, self.first_bytes :]
        memory[self.count * self.pair_bytes :] = file[self.count * self.pair_bytes :]

    def _paired(self, file: Bytes) -> Bytes:
        return file[: self.count * self.pair_bytes].reshape(self.count, self.pair_bytes)

    def _parts(self, memory: Bytes) -> tuple[Bytes, Bytes]:
        firsts = memory[: self.seconds_start].reshape(self.count, self.first_bytes)
        seconds = memory[self.seconds_start : self.count * self.pair_bytes].reshape(self.count, self.second_bytes)
        return firsts, seconds
