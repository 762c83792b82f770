"""Cosines and sines of a model's positions, where programs find them. Knows nothing about heads or sequences."""

from offload.errors import ModelFormatError
from offload.gguf import TensorInfo
from runtime.architectures.base import Model, Rope
from runtime.executor.rotary import RotaryTable
from runtime.panels import PanelWeights


class Angles:
    """The tables of every `Rope` of a model, made as far as positions were asked for."""

    def __init__(self, model: Model, weights: PanelWeights) -> None:
        self.ropes = tuple(dict.fromkeys(layer.rope for layer in model.layers))
        self._weights = weights
        self._tables: dict[tuple[Rope, TensorInfo | None], RotaryTable] = {}

    def addresses(self, capacity_tokens: int, stop: int) -> list[tuple[int, int]]:
        """Of (cosines, sines) of positions 0 to stop - 1 for each of `ropes`; valid until a greater `stop` is asked."""
        places = []
        for rope in self.ropes:
            cos, sin = self.table(rope, capacity_tokens).at(0, stop)
            places.append((cos.ctypes.data, sin.ctypes.data))
        return places

    def table(self, rope: Rope, capacity_tokens: int) -> RotaryTable:
        """That of one of `ropes` for sequences of so many tokens."""
        factors = rope.factors(capacity_tokens)
        if (rope, factors) not in self._tables:
            self._tables[rope, factors] = self._table(rope, factors)
        return self._tables[rope, factors]

    def _table(self, rope: Rope, factors: TensorInfo | None) -> RotaryTable:
        if factors is None:
            return RotaryTable(rope)
        divisors = self._weights.vector(factors)
        if not (divisors > 0).all():
            raise ModelFormatError(
                f"tensor {factors.name} divides angles by numbers that are not above 0",
                hint="the file is damaged or was converted wrongly",
            )
        return RotaryTable(rope, divisors)
