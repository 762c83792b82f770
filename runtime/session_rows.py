"""Rows of KV that are kept on flash: brought back instead of computed where a sequence begins with their tokens.

What a block of rows is kept under says all that its bits depend on: the model's files, the types of KV, the settings of
rotary positions, what computed it, and all tokens before its end. Knows nothing of text. Invariant: a row that is
brought back has the bits that computing it here would give.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import cached_property

from offload.errors import FlashError
from offload.gguf import GGUFFile
from offload.kv_session_block import BlockSize, chain, root_digest
from offload.kv_session_folder import BlockFolder
from offload.kv_session_reader import read_blocks
from offload.store_key import StoreKey, store_key
from offload.tiers import Tier
from planner.plan import Plan
from planner.ways import HYBRID
from runtime.architectures import describe
from runtime.architectures.base import Rope
from runtime.executor.base import KVHandle
from runtime.executor.saved_rows import SavedRows

log = logging.getLogger("strata.session")


class RowsKeys:
    """Keys of the rows that a model computes by a plan."""

    def __init__(self, gguf: GGUFFile, plan: Plan) -> None:
        self._gguf, self._plan = gguf, plan

    def of(self, kv: KVHandle) -> StoreKey | None:
        """The key of a cache's rows, None where they cannot be saved; FlashError if the model's file went away."""
        if not isinstance(kv, SavedRows):
            return None
        factors = [rope.factors(kv.capacity_tokens) for rope in self._ropes]
        angles = ",".join(dict.fromkeys(tensor.name for tensor in factors if tensor is not None))
        parts = [kv.rows_layout.name, _computed_by(self._plan), *([f"angles divided by {angles}"] if angles else [])]
        return replace(self._model, layout="; ".join(parts))

    @cached_property
    def _model(self) -> StoreKey:
        return store_key(self._gguf, "")

    @cached_property
    def _ropes(self) -> tuple[Rope, ...]:
        return tuple(dict.fromkeys(layer.rope for layer in describe(self._gguf).layers))


class KeptRows:
    """The rows in `folders`, of which the first is written to; `what` they are, for messages."""

    def __init__(self, keys: RowsKeys, folders: Sequence[BlockFolder], what: str) -> None:
        self._keys = keys
        self._folders = folders
        self._what = what

    def restore(self, kv: KVHandle, token_ids: Sequence[int], held: int) -> int:
        """Rows of `kv` that hold `token_ids` afterwards, of which `held` did before; at least one token is left."""
        started = time.perf_counter()
        if not isinstance(kv, SavedRows):
            return held
        size = _size(kv)
        first = held // size.tokens
        digests = self.digests(kv, token_ids[: len(token_ids) - 1])[first:]
        found = []
        for digest in digests:
            folder = next((folder for folder in self._folders if folder.has(digest)), None)
            if folder is None:
                break
            found.append((folder, digest))
        if (first + len(found)) * size.tokens <= held:
            return held
        blocks = [(folder.path(digest), digest) for folder, digest in found]
        refused = read_blocks(
            blocks, size, lambda index, rows: kv.import_block(first + index, rows), at_once=kv.blocks_at_once
        )
        good = len(found) if refused is None else refused.index
        restored = max(held, (first + good) * size.tokens)
        kv.restored(restored)
        if refused is not None:
            why = f"{refused.path.name}: {refused.fault.reason}"
            log.warning("%s: tokens from %d on are computed again: %s", self._what, restored, why)
            _dropped(*found[refused.index])
        for folder in self._folders:
            folder.touch([digest for its, digest in found if its is folder])
        seconds = time.perf_counter() - started
        log.info("%s: %d tokens from flash in %.3f s", self._what, restored - held, seconds)
        return restored

    def write(self, kv: KVHandle, token_ids: Sequence[int]) -> None:
        """Writes the whole blocks of rows of `token_ids` that are not there yet; a warning says if that fails."""
        if not isinstance(kv, SavedRows):
            return
        size, folder = _size(kv), self._folders[0]
        digests = self.digests(kv, token_ids[: kv.final_tokens])
        folder.touch(digests)
        missing = [index for index, digest in enumerate(digests) if not folder.has(digest)]
        try:
            written = folder.write(
                [digests[index] for index in missing],
                size,
                lambda number, out: kv.export_block(missing[number], out),
            )
        except FlashError as error:
            log.warning("%s: KV is not kept: %s", self._what, error)
            return
        if written < len(missing):
            tokens = (len(missing) - written) * size.tokens
            log.warning("%s: there is no room for the KV of %d tokens", self._what, tokens)

    def digests(self, kv: KVHandle, token_ids: Sequence[int]) -> list[bytes]:
        """What the whole blocks of these tokens are kept under."""
        key = self._keys.of(kv)
        if key is None or not isinstance(kv, SavedRows):
            return []
        parts = [key.layout, *(astuple(source)[1:] for source in key.sources)]
        return chain(root_digest(json.dumps(parts)), token_ids, kv.rows_layout.block_tokens)


def _size(kv: SavedRows) -> BlockSize:
    return BlockSize(kv.rows_layout.block_tokens, kv.rows_layout.block_bytes)


def _dropped(folder: BlockFolder, digest: bytes) -> None:
    """Removes a block that cannot be used, so that it is written anew."""
    try:
        folder.drop(digest)
    except FlashError as error:
        log.warning("%s", error)


def _computed_by(plan: Plan) -> str:
    """What computes rows, as far as their bits depend on it."""
    from cpu_kernels.isa import current as current_isa  # noqa: PLC0415 - brings llvmlite

    settings = plan.settings
    words = [f"computed by the {settings.loop} loop with {current_isa().name}"]
    if settings.tuning is not None:
        choices = sorted(settings.tuning.choices.items())
        words += [f"{name} {choice.family}/{choice.tile_columns}" for name, choice in choices]
    if settings.loop == HYBRID:
        on_gpu = [placement.unit for placement in plan.placements if placement.tier is Tier.GPU]
        words.append(f"on {settings.device} {' '.join(on_gpu)}")
    return ", ".join(words)
