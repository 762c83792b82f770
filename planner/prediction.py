"""What a plan promises and what a run measures, under the same names, and how far the two were apart.

Values alone: knows nothing about how they are computed, measured or kept.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from planner import document


class Bottleneck(StrEnum):
    """The resource that decides the decode speed."""

    RAM_BANDWIDTH = "RAM bandwidth"
    GPU_BANDWIDTH = "GPU bandwidth"
    DEQUANTISATION = "dequantisation"
    OVERHEAD = "operation overhead"
    COMPUTE = "compute"
    LINK = "GPU link"
    FLASH = "flash reads"


@dataclass(frozen=True, slots=True)
class Residual:
    """Measured over predicted time, averaged over `runs` earlier runs: 1.3 means 30% slower than predicted."""

    factor: float
    runs: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan promises; the corrections are the factors on times, learned from earlier runs, that are in it."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    ttft_s: float
    peak_ram_bytes: int
    peak_gpu_bytes: int
    bottleneck: Bottleneck
    prompt_tokens: int  # that `ttft_s` and `prefill_tokens_per_s` are for
    decode_correction: Residual
    prefill_correction: Residual
    hit_rate: float | None = None  # of experts that a token uses, those in slots of RAM or GPU; None without slots

    def as_dict(self) -> dict[str, Any]:
        """The prediction as JSON types."""
        return dict(document.encode(self))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a run measured, under the keys of `Prediction`; None where it did not get so far."""

    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    ttft_s: float | None
    peak_ram_bytes: int
    prompt_tokens: int | None = None  # that were computed, not taken from a cache
    decoded_tokens: int | None = None  # that `decode_tokens_per_s` is of; None: enough
    peak_gpu_bytes: int | None = None
    hit_rate: float | None = None
    found_rate: float | None = None  # of experts, in the GPU's memory or in RAM; None where RAM has all, or no GPU some
    bottleneck: Bottleneck | None = None  # always None: a run does not tell what it was bound by

    def as_dict(self) -> dict[str, Any]:
        """The measurement as JSON types."""
        return dict(document.encode(self))
