"""Keys and values of which a part lies on flash: how much RAM they take then, and what reading them costs a step.

All layers have as many pieces in RAM, but where tokens choose what they read: those that are read whole have more, as
long as there is room. The index that is chosen by, and the memory that the others are read to, are part of what they
take. Knows nothing about how plans are found. Times are seconds, sizes bytes.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cpu_kernels.kv_layout import CHUNK_PAGE_BYTES, PIECE_TOKENS, pieces_of
from offload.kv_chunks import cached_chunks, staging_slots
from offload.kv_spill import FREE_BYTES
from offload.tiers import Tier
from planner.budget import format_size
from planner.figures import duration, figures
from planner.folders import spill_folder
from planner.machine import SpillRates
from planner.model_shape import ModelShape
from planner.plan import Settings
from planner.prediction import Bottleneck, Prediction
from planner.profile import Profile
from planner.profile_spill import spill_rates

HITS_BY_SHARE = 0.6  # the power to which the share that a cache holds is raised
LOOKED_UP_S = 0.5e-3  # what finding out where the chosen blocks of a layer are takes, beside reading them
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

    def ram_bytes(self, context_tokens: int, whole: int, part: int, *, caches: bool = True) -> int:
        """RAM for so long a context of which so many pieces are there; `caches`: and the most chosen of the others."""
        every = pieces_of(context_tokens)
        slots = staging_slots(self.layers, self.slot_bytes, every - whole, every - part if self.chosen else 0)
        cached = cached_chunks(every - part, part) if self.chosen and caches else 0
        held = whole * self.whole_bytes + (part + cached) * self.part_bytes
        return held + slots * self.slot_bytes + self.index_bytes * context_tokens


def kv_ram_bytes(shape: ModelShape, context_tokens: int, pieces: int) -> int:
    """RAM for so long a context of which that many pieces of every layer are in RAM, and no more."""
    kept = min(pieces, pieces_of(context_tokens))
    return _Sizes.of(shape).ram_bytes(context_tokens, kept, kept, caches=False)


def all_kv_bytes(shape: ModelShape, context_tokens: int) -> int:
    """RAM that holds all of so long a context, in whole chunks."""
    return kv_ram_bytes(shape, context_tokens, pieces_of(context_tokens))


def least_kv_ram_bytes(shape: ModelShape, context_tokens: int) -> int:
    """The least RAM in which so long a context can be kept, with the rest on flash."""
    return kv_ram_bytes(shape, context_tokens, LEAST_PIECES)


def spread_in(shape: ModelShape, context_tokens: int, ram_bytes: int) -> Spread:
    """How such a context is spread over RAM and flash: layers that are chosen from leave RAM first."""
    sizes, every = _Sizes.of(shape), pieces_of(context_tokens)

    def left(place: int) -> int:
        return ram_bytes - sizes.ram_bytes(context_tokens, *_step(sizes, every, place))

    steps = range(2 * every - 1 if sizes.chosen else every)
    place = next((step for step in steps if left(step) >= 0), None)
    if place is None:
        return Spread(every, 0, 0)
    whole, part = _step(sizes, every, place)
    if not sizes.chosen or part == every:
        return Spread(every, whole, part)
    another = sizes.ram_bytes(context_tokens, whole, part + 1) - sizes.ram_bytes(context_tokens, whole, part)
    return Spread(every, whole, part, min(left(place) * sizes.chosen // max(another, 1), sizes.chosen))


def _step(sizes: _Sizes, every: int, place: int) -> tuple[int, int]:
    """Pieces in RAM, of layers that are read whole and of others, where so many steps were taken to leave it."""
    if not sizes.chosen:
        return every - place, every - place
    return min(every, 2 * every - 1 - place), max(every - place, 1)


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
    whole, part = _cold(shape, depth, spilling.ram_bytes, tokens)
    lost = lost_seconds(spilling.rates, whole, part, sum(seconds.values()))
    if part:
        lost += _Sizes.of(shape).chosen * LOOKED_UP_S
    return {**seconds, Bottleneck.FLASH: seconds.get(Bottleneck.FLASH, 0.0) + lost}


def lost_seconds(rates: SpillRates, whole: int, part: int, computing_s: float) -> float:
    """Seconds that reading so many bytes, and those of parts of chunks, adds to a step that computes for so long."""
    beside = min(whole / rates.beside_bytes_per_s, computing_s / rates.computed_share)
    left = whole - beside * rates.beside_bytes_per_s
    return beside * (1 - rates.computed_share) + left / rates.bytes_per_s + part / rates.parts_bytes_per_s


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
    chosen = part * shape.kv.read_tokens(shape.block_count - 1, depth) // max(depth, 1)
    return whole, int(chosen * (1 - _hits(spread, sizes)))


def _hits(spread: Spread, sizes: _Sizes) -> float:
    """What of the blocks on flash that are chosen is in RAM, because it was chosen most before.

    As with random keys: 37% of blocks with room for 22% of them, 53% for 35%. Of text trained models choose more alike.
    """
    if not sizes.chosen or spread.part == spread.every:
        return 0.0
    less, more = (cached_chunks(spread.every - part, part) for part in (spread.part, spread.part + 1))
    cached = less + (more - less) * spread.more / sizes.chosen
    cold = spread.every - spread.part - spread.more / sizes.chosen
    return float(min(cached / cold, 1.0) ** HITS_BY_SHARE) if cold else 0.0


def spill_room() -> int:
    """Bytes of the drive that keys and values may take."""
    folder = spill_folder()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return max(shutil.disk_usage(there).free - FREE_BYTES, 0)


def spill_notes(shape: ModelShape, context_tokens: int, spilling: Spilling, full: Prediction) -> Iterator[str]:
    """How a full context is spread where RAM does not hold all of it, and how fast it is: as `full` predicts.

    And whether the drive has no room for it, or reading less of it takes longer.
    """
    spread, sizes = spread_in(shape, context_tokens, spilling.ram_bytes), _Sizes.of(shape)
    if spread.whole == spread.part == spread.every:
        return
    kept = (sizes.layers - sizes.chosen) * spread.whole + sizes.chosen * spread.part + spread.more
    num_bytes = cold_bytes(shape, context_tokens, spilling.ram_bytes, tokens=context_tokens)
    read_bytes = cold_bytes(shape, context_tokens, spilling.ram_bytes)
    yield from flash_notes(f"{kept} of {sizes.layers * spread.every}", num_bytes, read_bytes, full)
    if shape.kv.budget_tokens is None:
        return
    whole = shape.with_kv(replace(shape.kv, budget_tokens=None))
    chosen_s, whole_s = (reading_seconds(read, spilling, context_tokens) for read in (shape, whole))
    if chosen_s > whole_s:
        yield (
            f"what --kv-budget chooses lies scattered on flash: reading it takes {chosen_s * 1e3:.0f} ms a token in a "
            f"full context, reading all {whole_s * 1e3:.0f} ms"
        )


def flash_notes(kept: str, num_bytes: int, read_bytes: int, full: Prediction) -> Iterator[str]:
    """What a full context has in RAM (`kept`) and on flash, how fast that is, and whether the drive has no room for it.

    A token reads `read_bytes` of the `num_bytes` on flash; `full` is predicted.
    """
    yield (
        f"KV: {kept} chunks of {PIECE_TOKENS} tokens in {Tier.RAM.value.upper()}, the rest ({format_size(num_bytes)}) "
        f"on flash in {spill_folder()}"
    )
    yield (
        f"with the context full: {figures(full.decode_tokens_per_s)} tokens/s, each reading {format_size(read_bytes)} "
        f"of KV from flash; the first token of such a prompt after {duration(full.ttft_s)}"
    )
    if num_bytes > (room := spill_room()):
        yield (
            f"flash has room for {format_size(room)} of these {format_size(num_bytes)}: what needs more ends with an "
            "error; smaller types (-ctk, -ctv) or free space on the drive help"
        )
