"""Keys and values of which a part lies on flash: how much RAM they take then, and what reading them costs a step.

All layers have as many pieces in RAM, but where tokens choose what they read: those that are read whole have more, as
long as there is room. The index that is chosen by, and the memory that the others are read to, are part of what they
take. Knows nothing about how plans are found. Times are seconds, sizes bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cpu_kernels.kv_layout import CHUNK_PAGE_BYTES, PIECE_TOKENS, pieces_of
from offload.kv_chunks import staging_slots
from offload.tiers import Tier
from planner.budget import format_size
from planner.folders import spill_folder
from planner.machine import SpillRates
from planner.model_shape import ModelShape
from planner.plan import Settings
from planner.prediction import Bottleneck
from planner.profile import Profile
from planner.profile_spill import spill_rates

LEAST_PIECES = 4  # in RAM: the newest, and some that are on their way to flash


@dataclass(frozen=True, slots=True)
class Spilling:
    """How fast chunks of KV are read from the drive, and the RAM that all of them may take."""

    rates: SpillRates
    ram_bytes: int


def spilling_here(profile: Profile, settings: Settings) -> Spilling | None:
    """Where a plan's chunks lie that RAM does not hold; the drive is measured where it is not known."""
    if settings.kv_ram_bytes is None:
        return None
    return Spilling(spill_rates(profile, spill_folder()), settings.kv_ram_bytes)


@dataclass(frozen=True, slots=True)
class Spread:
    """Pieces in RAM, of `every` that there are: of layers that are read whole, and of those that tokens choose from,
    which have `more` chunks there beside them.
    """

    every: int
    whole: int
    part: int
    more: int = 0


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of a piece in layers that are read whole, and in the `chosen` others; of a slot; of a token's index."""

    layers: int
    chosen: int
    whole_bytes: int
    part_bytes: int
    slot_bytes: int
    index_bytes: int

    @classmethod
    def of(cls, shape: ModelShape) -> "_Sizes":
        layers = range(len(shape.kv_bytes_per_layer))
        index = [shape.kv_index_bytes(layer) for layer in layers]
        kept = [(shape.kv_bytes_per_layer[layer] - index[layer]) * PIECE_TOKENS for layer in layers]
        chunks = [-(-num_bytes // CHUNK_PAGE_BYTES) * CHUNK_PAGE_BYTES for num_bytes in kept]
        chosen = [shape.kv.is_chosen_from(layer) for layer in layers]
        part = sum(size for size, is_chosen in zip(chunks, chosen, strict=True) if is_chosen)
        return cls(len(chunks), sum(chosen), sum(chunks) - part, part, max(chunks, default=0), sum(index))

    def ram_bytes(self, context_tokens: int, whole: int, part: int) -> int:
        """RAM for so long a context of which so many pieces are there."""
        every = pieces_of(context_tokens)
        slots = staging_slots(self.layers, every - whole, every - part if self.chosen else 0)
        held = whole * self.whole_bytes + part * self.part_bytes
        return held + slots * self.slot_bytes + self.index_bytes * context_tokens


def kv_ram_bytes(shape: ModelShape, context_tokens: int, pieces: int) -> int:
    """RAM for so long a context of which that many pieces of every layer are in RAM."""
    kept = min(pieces, pieces_of(context_tokens))
    return _Sizes.of(shape).ram_bytes(context_tokens, kept, kept)


def all_kv_bytes(shape: ModelShape, context_tokens: int) -> int:
    """RAM that holds all of so long a context, in whole chunks."""
    return kv_ram_bytes(shape, context_tokens, pieces_of(context_tokens))


def least_kv_ram_bytes(shape: ModelShape, context_tokens: int) -> int:
    """The least RAM in which so long a context can be kept, with the rest on flash."""
    return kv_ram_bytes(shape, context_tokens, LEAST_PIECES)


def spread_in(shape: ModelShape, context_tokens: int, ram_bytes: int) -> Spread:
    """How such a context is spread over RAM and flash: layers that are chosen from leave RAM first."""
    sizes, every = _Sizes.of(shape), pieces_of(context_tokens)
    if sizes.chosen:
        steps = [(every, part) for part in range(every, 0, -1)] + [(whole, 1) for whole in range(every - 1, 0, -1)]
    else:
        steps = [(pieces, pieces) for pieces in range(every, 0, -1)]
    for whole, part in steps:
        left = ram_bytes - sizes.ram_bytes(context_tokens, whole, part)
        if left >= 0:
            more = left * sizes.chosen // sizes.part_bytes if part < every and sizes.chosen else 0
            return Spread(every, whole, part, more)
    return Spread(every, 0, 0)


def cold_bytes(shape: ModelShape, depth: int, ram_bytes: int, tokens: int = 1) -> int:
    """Bytes that a step of so many tokens behind `depth` reads: those of a prompt read all, others what they choose."""
    return sum(_cold(shape, depth, ram_bytes, tokens))


def spilled_seconds(
    shape: ModelShape, seconds: Mapping[Bottleneck, float], spilling: Spilling, depth: int, tokens: int = 1
) -> Mapping[Bottleneck, float]:
    """Seconds of a step of so many tokens behind `depth` that takes `seconds` with all keys and values in RAM.

    What is read whole comes behind the arithmetic, each slowing the other down, and then alone. For what is chosen the
    step waits.
    """
    rates, whole, part = spilling.rates, *_cold(shape, depth, spilling.ram_bytes, tokens)
    computing = sum(seconds.values())
    beside = min(whole / rates.beside_bytes_per_s, computing / rates.computed_share)
    left = whole - beside * rates.beside_bytes_per_s
    lost = beside * (1 - rates.computed_share) + left / rates.bytes_per_s + part / rates.parts_bytes_per_s
    return {**seconds, Bottleneck.FLASH: seconds.get(Bottleneck.FLASH, 0.0) + lost}


def reading_seconds(shape: ModelShape, spilling: Spilling, depth: int, tokens: int = 1) -> float:
    """Seconds that the drive takes, beside nothing, for what a step of so many tokens behind `depth` reads."""
    whole, part = _cold(shape, depth, spilling.ram_bytes, tokens)
    return whole / spilling.rates.bytes_per_s + part / spilling.rates.parts_bytes_per_s


def _cold(shape: ModelShape, depth: int, ram_bytes: int, tokens: int) -> tuple[int, int]:
    """Bytes that a step reads: of layers that are read whole, and of what it chooses of others."""
    spread, sizes = spread_in(shape, depth, ram_bytes), _Sizes.of(shape)
    whole = (spread.every - spread.whole) * sizes.whole_bytes
    part = (spread.every - spread.part) * sizes.part_bytes - spread.more * sizes.part_bytes // max(sizes.chosen, 1)
    if tokens > 1:
        return whole + part, 0
    return whole, part * shape.kv.read_tokens(shape.block_count - 1, depth) // max(depth, 1)


def spill_notes(shape: ModelShape, context_tokens: int, spilling: Spilling) -> Iterator[str]:
    """How a full context is spread where RAM does not hold all of it, and whether reading less of it takes longer."""
    spread, sizes = spread_in(shape, context_tokens, spilling.ram_bytes), _Sizes.of(shape)
    if spread.whole == spread.part == spread.every:
        return
    kept = (sizes.layers - sizes.chosen) * spread.whole + sizes.chosen * spread.part + spread.more
    size = format_size(cold_bytes(shape, context_tokens, spilling.ram_bytes, tokens=context_tokens))
    yield (
        f"KV: {kept} of {sizes.layers * spread.every} chunks of {PIECE_TOKENS} tokens in {Tier.RAM.value.upper()}, "
        f"the rest ({size}) on flash in {spill_folder()}"
    )
    if shape.kv.budget_tokens is None:
        return
    whole = shape.with_kv(replace(shape.kv, budget_tokens=None))
    chosen_s, whole_s = (reading_seconds(read, spilling, context_tokens) for read in (shape, whole))
    if chosen_s > whole_s:
        yield (
            f"what --kv-budget chooses lies scattered on flash: reading it takes {chosen_s * 1e3:.0f} ms a token in a "
            f"full context, reading all {whole_s * 1e3:.0f} ms"
        )
