"""What one answer measured: its speeds, and what the process took by then.

Knows nothing of how it was computed or predicted.
"""

from dataclasses import dataclass

from offload.cache_counts import CacheCounts
from planner.prediction import Measurement
from runtime.generation import Generation
from runtime.process import peak_ram_bytes

LEAST_LOOKUPS = 1000  # of experts, from which a hit rate is told


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What the caches of experts have seen: the GPU's, and RAM's, which is asked for what the GPU does not compute.

    None for one that there is not.
    """

    gpu: CacheCounts | None = None
    ram: CacheCounts | None = None

    @property
    def hit_rate(self) -> float | None:
        """Of the experts that are looked up on the GPU, where there are some, else in RAM; None for too few."""
        counts = self.gpu or self.ram
        return counts.hit_rate if counts is not None and counts.lookups >= LEAST_LOOKUPS else None

    @property
    def found_rate(self) -> float | None:
        """Of the experts that were used, those found in either memory; None for too few, or where it is one memory."""
        if self.gpu is None or self.ram is None:
            return None
        used = self.gpu.lookups - self.gpu.misses + self.ram.lookups
        lacking = self.ram.misses + self.ram.foreseen_used
        return 1 - lacking / used if used >= LEAST_LOOKUPS else None

    def since(self, before: "ExpertCounts") -> "ExpertCounts":
        """What came after."""
        return ExpertCounts(_since(self.gpu, before.gpu), _since(self.ram, before.ram))


def measurement(
    generation: Generation, counts: ExpertCounts | None, before: ExpertCounts | None, *, gpu_bytes: int | None
) -> Measurement:
    """Of an answer so far; `counts`: where experts were found by now, and `before`, when the prompt had been read."""
    timing = generation.timing
    decoding = counts.since(before) if counts is not None and before is not None else ExpertCounts()
    return Measurement(
        decode_tokens_per_s=timing.decode_tokens_per_s,
        prefill_tokens_per_s=timing.prefill_tokens_per_s,
        ttft_s=timing.ttft_s,
        peak_ram_bytes=peak_ram_bytes(),
        peak_gpu_bytes=gpu_bytes,
        prompt_tokens=timing.prompt_tokens,
        decoded_tokens=max(timing.generated_tokens - 1, 0),
        hit_rate=decoding.hit_rate,
        found_rate=decoding.found_rate,
    )


def _since(counts: CacheCounts | None, before: CacheCounts | None) -> CacheCounts | None:
    return counts if counts is None or before is None else counts.since(before)
