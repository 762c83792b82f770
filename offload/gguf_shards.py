"""The files of one model: a single one, or the shards `name-00001-of-0000N.gguf` opened from any of them.

Knows nothing about tensors beyond their names and number. A file's metadata (`split.count`, `split.no`,
`split.tensors.count`) says that it is a shard; its name only tells where the others are.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from offload.errors import FlashError, ModelFormatError
from offload.gguf_access import MetadataAccess
from offload.gguf_header import GGUFHeader
from offload.gguf_source import ByteSource

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
HINT = "download all shards of the model into one folder, under their own names"
MAX_SHARDS = 65535

ReadHeader = Callable[[ByteSource, int], GGUFHeader]


class _ShardMetadata(MetadataAccess):
    """The `split.*` keys of one file, typed."""

    def __init__(self, path: Path, header: GGUFHeader) -> None:
        self.path, self.metadata = path, header.metadata
        self.count = self.get_int("split.count", 1, minimum=0, maximum=MAX_SHARDS)
        self.number = self.get_int("split.no", 0, minimum=0, maximum=MAX_SHARDS)
        self.num_tensors = self.get_int("split.tensors.count", None, minimum=0)


def open_shards(path: Path, read_header: ReadHeader) -> tuple[tuple[ByteSource, ...], tuple[GGUFHeader, ...]]:
    """Opens the file at `path` and every other shard of its model, in order of their numbers.

    ModelFormatError if a shard is missing, damaged or of another model; then no file stays open.
    """
    sources: list[ByteSource] = []
    try:
        sources.append(ByteSource(path))
        header = read_header(sources[0], 0)
        paths = shard_paths(path, _ShardMetadata(path, header))
        if len(paths) == 1:
            return tuple(sources), (header,)
        sources.pop().close()
        headers = []
        for shard, shard_path in enumerate(paths):
            sources.append(_open_shard(shard_path, path))
            headers.append(read_header(sources[shard], shard))
        check_shards(paths, headers)
        return tuple(sources), tuple(headers)
    except BaseException:
        for source in sources:
            source.close()
        raise


def shard_paths(path: Path, split: _ShardMetadata) -> list[Path]:
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


def check_shards(paths: Sequence[Path], headers: Sequence[GGUFHeader]) -> None:
    """ModelFormatError unless the shards number themselves in order, agree, and hold each tensor once."""
    owners: dict[str, Path] = {}
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


def _open_shard(shard_path: Path, opened: Path) -> ByteSource:
    try:
        return ByteSource(shard_path)
    except FlashError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ModelFormatError(f"{shard_path}: this shard of {opened.name} is missing", hint=HINT) from error
        raise
