"""The shape of a matrix that is multiplied, and under which name what was measured of it is kept; without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProductShape:
    """A matrix that is multiplied."""

    quant_type: str
    rows: int
    columns: int

    def key(self, bucket: int) -> str:
        """Under which the way of so many columns is kept."""
        return f"{self.quant_type} {self.rows}x{self.columns} {bucket}"
