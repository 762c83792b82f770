"""The files of one model: a single one, or the shards `name-00001-of-0000N.gguf` opened from any of them.

Knows nothing about tensors beyond their names and number. A file's metadata (`split.count`, `split.no`,
`split.tensors.count`) says that it is a shard; its name only tells where the others are.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import TypeVar

from offload.errors import FlashError, ModelFormatError
from offload.gguf_access import MetadataAccess
from offload.gguf_header import GGUFHeader
from offload.source import FileName, Source

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
HINT = "download all shards of the model into one folder, under their own names"
MAX_SHARDS = 65535

ReadHeader = Callable[[Source, int], GGUFHeader]
_Name = TypeVar("_Name", bound=FileName)
_Source = TypeVar("_Source", bound=Source)


class _ShardMetadata(MetadataAccess):
    """The `split.*` keys of one file, typed."""

    def __init__(self, path: FileName, header: GGUFHeader) -> None:
        self.path, self.metadata = path, header.metadata
        self.count = self.get_int("split.count", 1, minimum=0, maximum=MAX_SHARDS)
        self.number = self.get_int("split.no", 0, minimum=0, maximum=MAX_SHARDS)
        self.num_tensors = self.get_int("split.tensors.count", None, minimum=0)


def open_shards(
    path: _Name, open_source: Callable[[_Name], _Source], read_header: ReadHeader
) -> tuple[tuple[_Source, ...], tuple[GGUFHeader, ...]]:
    """Opens the file at `path` and every other shard of its model, in order of their numbers.

    ModelFormatError if a shard is missing, damaged or of another model; then no file stays open.
    """
    with ExitStack() as opened:
        first = opened.enter_context(closing(open_source(path)))
        header = read_header(first, 0)
        paths = shard_paths(path, _ShardMetadata(path, header))
        if len(paths) == 1:
            opened.pop_all()
            return (first,), (header,)
        sources, headers = [], []
        for shard, shard_path in enumerate(paths):
            is_first = shard_path == path
            source = first if is_first else opened.enter_context(closing(_open_shard(shard_path, path, open_source)))
            sources.append(source)
            headers.append(header if is_first and shard == 0 else read_header(source, shard))
        check_shards(paths, headers)
        opened.pop_all()
        return tuple(sources), tuple(headers)


def shard_paths(path: _Name, split: _ShardMetadata) -> list[_Name]:
    """Where all shards should be, in order; only `path` for a model in one file."""
    if split.count <= 1:
        return [path]
    name = SHARD_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != split.count or int(name["number"]) != split.number + 1:
        expected = f"-{split.number + 1:05}-of-{split.count:05}.gguf"
        raise ModelFormatError(
            f"{path}: is shard {split.number + 1} of {split.count}, but its name does not end in {expected}", hint=HINT
        )
    return [path.with_name(f"{name['stem']}-{index + 1:05}-of-{split.count:05}.gguf") for index in range(split.count)]


def check_shards(paths: Sequence[FileName], headers: Sequence[GGUFHeader]) -> None:
    """ModelFormatError unless the shards number themselves in order, agree, and hold each tensor once."""
    owners: dict[str, FileName] = {}
    for shard, (path, header) in enumerate(zip(paths, headers, strict=True)):
        split = _ShardMetadata(path, header)
        if (split.number, split.count) != (shard, len(paths)):
            raise ModelFormatError(
                f"{path}: says it is shard {split.number + 1} of {split.count}, but its name says "
                f"{shard + 1} of {len(paths)}",
                hint=HINT,
            )
        for tensor in header.tensors:
            if tensor in owners:
                raise ModelFormatError(f"{path}: tensor {tensor!r} stands in {owners[tensor].name} too", hint=HINT)
            owners[tensor] = path
        first = _ShardMetadata(paths[0], headers[0])
        if split.num_tensors != first.num_tensors:
            raise ModelFormatError(
                f"{path}: split.tensors.count is {split.num_tensors}, but {first.num_tensors} in {paths[0].name}",
                hint=HINT,
            )
    expected = _ShardMetadata(paths[0], headers[0]).num_tensors
    if expected is not None and expected != len(owners):
        raise ModelFormatError(
            f"{paths[0]}: split.tensors.count is {expected}, but the shards hold {len(owners)} tensors", hint=HINT
        )


def _open_shard(shard_path: _Name, opened: FileName, open_source: Callable[[_Name], _Source]) -> _Source:
    try:
        return open_source(shard_path)
    except FlashError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ModelFormatError(f"{shard_path}: this shard of {opened.name} is missing", hint=HINT) from error
        raise
