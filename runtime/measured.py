"""What one answer measured: its speeds, and what the process took by then.

Knows nothing of how it was computed or predicted.
"""

from offload.cache_counts import CacheCounts
from planner.prediction import Measurement
from runtime.generation import Generation
from runtime.process import peak_ram_bytes

LEAST_LOOKUPS = 1000  # of experts, from which a hit rate is told


def measurement(
    generation: Generation, counts: CacheCounts | None, before: CacheCounts | None, *, gpu_bytes: int | None
) -> Measurement:
    """Of an answer so far; `counts`: where experts were found by now, and `before`, when the prompt had been read."""
    timing = generation.timing
    decoding = counts.since(before) if counts is not None and before is not None else CacheCounts()
    return Measurement(
        decode_tokens_per_s=timing.decode_tokens_per_s,
        prefill_tokens_per_s=timing.prefill_tokens_per_s,
        ttft_s=timing.ttft_s,
        peak_ram_bytes=peak_ram_bytes(),
        peak_gpu_bytes=gpu_bytes,
        prompt_tokens=timing.prompt_tokens,
        hit_rate=decoding.hit_rate if decoding.lookups >= LEAST_LOOKUPS else None,
    )
