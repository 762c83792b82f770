"""Keys and values of which a part lies on flash: how much RAM they take then, and what reading them costs a step.

All layers have as many pieces in RAM; the memory that the others are read to is part of what they take. Knows nothing
about how plans are found. Times are seconds, sizes bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cpu_kernels.kv_layout import CHUNK_PAGE_BYTES, PIECE_TOKENS, pieces_of
from offload.kv_chunks import staging_slots
from offload.tiers import Tier
from planner.budget import format_size
from planner.drive import drive_at
from planner.folders import spill_folder
from planner.machine import Flash
from planner.model_shape import ModelShape
from planner.plan import Settings
from planner.prediction import Bottleneck
from planner.profile import Profile
from planner.streamed import reads_bytes_per_s

# Reads whose checksums are taken while the processor computes: 272 MiB a step came at 2.4 GB/s from a drive that gives
# 2.8 GB/s beside nothing but the checks, and 3.2 GB/s without them (virtio disk, two Zen 5 cores).
CHECKED_SHARE = 0.85
LEAST_PIECES = 4  # in RAM: the newest, and some that are on their way to flash


@dataclass(frozen=True, slots=True)
class Spilling:
    """The drive that chunks of KV are read from, and the RAM that all of them may take."""

    flash: Flash
    ram_bytes: int


def spilling_here(profile: Profile, settings: Settings) -> Spilling | None:
    """Where a plan's chunks lie that RAM does not hold; the drive is measured where it is not known."""
    if settings.kv_ram_bytes is None:
        return None
    return Spilling(drive_at(profile, spill_folder()), settings.kv_ram_bytes)


def kv_ram_bytes(shape: ModelShape, context_tokens: int, pieces: int) -> int:
    """RAM for so long a context of which that many pieces are in RAM."""
    cold = max(pieces_of(context_tokens) - pieces, 0)
    layers = shape.block_count
    return min(pieces, pieces_of(context_tokens)) * _piece_bytes(shape) + staging_slots(layers, cold) * _slot(shape)


def all_kv_bytes(shape: ModelShape, context_tokens: int) -> int:
    """RAM that holds all of so long a context, in whole chunks."""
    return kv_ram_bytes(shape, context_tokens, pieces_of(context_tokens))


def least_kv_ram_bytes(shape: ModelShape, context_tokens: int) -> int:
    """The least RAM in which so long a context can be kept, with the rest on flash."""
    return kv_ram_bytes(shape, context_tokens, LEAST_PIECES)


def pieces_in_ram(shape: ModelShape, context_tokens: int, ram_bytes: int) -> int:
    """Pieces of such a context that are in RAM."""
    every = pieces_of(context_tokens)
    fitting = (pieces for pieces in range(every, 0, -1) if kv_ram_bytes(shape, context_tokens, pieces) <= ram_bytes)
    return next(fitting, 0)


def cold_bytes(shape: ModelShape, depth: int, ram_bytes: int) -> int:
    """Bytes that a step behind `depth` tokens reads."""
    cold = pieces_of(depth) - pieces_in_ram(shape, depth, ram_bytes)
    return cold * _piece_bytes(shape)


def spilled_seconds(
    shape: ModelShape, seconds: Mapping[Bottleneck, float], spilling: Spilling, depth: int
) -> Mapping[Bottleneck, float]:
    """Seconds of a step behind `depth` tokens that takes `seconds` with all keys and values in RAM.

    Reads go on behind the arithmetic of the layers, but for the first layer's.
    """
    reading = reading_seconds(shape, spilling, depth)
    hidden = min(reading, sum(seconds.values())) * (1 - 1 / max(shape.block_count, 1))
    return {**seconds, Bottleneck.FLASH: seconds.get(Bottleneck.FLASH, 0.0) + reading - hidden}


def reading_seconds(shape: ModelShape, spilling: Spilling, depth: int) -> float:
    """Seconds that the drive takes for what a step behind `depth` tokens reads."""
    rate = CHECKED_SHARE * reads_bytes_per_s(spilling.flash, _slot(shape))
    return cold_bytes(shape, depth, spilling.ram_bytes) / rate


def spill_note(shape: ModelShape, context_tokens: int, ram_bytes: int) -> str:
    """How the chunks of a full context are spread, in words."""
    every, layers = pieces_of(context_tokens), shape.block_count
    kept = pieces_in_ram(shape, context_tokens, ram_bytes)
    size = format_size((every - kept) * _piece_bytes(shape))
    return (
        f"KV: {kept * layers} of {every * layers} chunks of {PIECE_TOKENS} tokens in {Tier.RAM.value.upper()}, "
        f"the rest ({size}) on flash in {spill_folder()}"
    )


def _slot(shape: ModelShape) -> int:
    """Bytes of the largest layer's chunk."""
    largest = max(shape.kv_bytes_per_layer, default=0) * PIECE_TOKENS
    return -(-largest // CHUNK_PAGE_BYTES) * CHUNK_PAGE_BYTES


def _piece_bytes(shape: ModelShape) -> int:
    return sum(-(-size * PIECE_TOKENS // CHUNK_PAGE_BYTES) * CHUNK_PAGE_BYTES for size in shape.kv_bytes_per_layer)
