"""`strata inspect`: what is in a GGUF file, from its header alone; works for models that cannot be run."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from offload.errors import RequestError
from offload.gguf import GGUFFile, MetadataValue, TensorInfo
from planner.budget import format_size
from runtime.cli import options
from runtime.cli.console import write_json
from runtime.cli.headers import open_header

SHOWN_ITEMS = 4
SHOWN_CHARACTERS = 96


def command(
    file: Annotated[str | None, typer.Argument(help="A GGUF file here or on a server, or `demo`.")] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="The same as the argument.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Tell what is in a GGUF file."""
    name = file or model
    if name is None:
        raise RequestError("no model is named", hint="name a GGUF file: strata inspect FILE, or `demo`")
    with open_header(name) as gguf:
        if as_json:
            write_json(as_document(gguf))
        else:
            render(Console(highlight=False), gguf, list_tensors=tensors)


def as_document(gguf: GGUFFile) -> dict[str, Any]:
    """Everything the header says, as JSON values; long arrays by their length and first items."""
    return {
        "files": [str(path) for path in gguf.paths],
        "version": gguf.version,
        "alignment": gguf.alignment,
        "bytes": gguf.byte_size,
        "parameters": sum(tensor.num_elements for tensor in gguf.tensors.values()),
        "types": _type_bytes(gguf),
        "metadata": {key: _json_value(value) for key, value in gguf.metadata.items()},
        "tensors": [
            {
                "name": tensor.name,
                "type": tensor.quant_type.name,
                "shape": list(tensor.shape),
                "shard": tensor.shard,
                "offset": tensor.offset,
                "bytes": tensor.num_bytes,
                **({"experts": tensor.num_experts} if tensor.num_experts else {}),
            }
            for tensor in gguf.tensors.values()
        ],
    }


def render(console: Console, gguf: GGUFFile, *, list_tensors: bool) -> None:
    """The same for a reader."""
    parameters = sum(tensor.num_elements for tensor in gguf.tensors.values())
    shards = f", {len(gguf.paths)} shards" if len(gguf.paths) > 1 else ""
    console.print(
        f"[bold]{escape(gguf.path.name)}[/]  GGUF v{gguf.version}, {format_size(gguf.byte_size)}{shards}, "
        f"{_count(parameters)} parameters in {len(gguf.tensors)} tensors"
    )
    metadata = Table(box=None, show_header=False, pad_edge=False)
    metadata.add_column(style="cyan", no_wrap=True, min_width=max(map(len, gguf.metadata), default=0))
    metadata.add_column(overflow="ellipsis", no_wrap=True)
    for key, value in gguf.metadata.items():
        metadata.add_row(escape(key), escape(_shown(value)))
    console.print(metadata)
    types = Table(box=None, pad_edge=False)
    for title in ("type", "tensors", "bytes"):
        types.add_column(title, justify="left" if title == "type" else "right")
    counts = Counter(tensor.quant_type.name for tensor in gguf.tensors.values())
    for name, size in sorted(_type_bytes(gguf).items(), key=lambda item: -item[1]):
        types.add_row(name, str(counts[name]), format_size(size))
    if gguf.tensors:
        console.print()
        console.print(types)
    if list_tensors:
        console.print()
        console.print(_tensor_table(gguf.tensors.values()))


def _tensor_table(tensors: Iterable[TensorInfo]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("tensor", "type", "shape", "offset", "bytes"):
        table.add_column(title, justify="right" if title in ("offset", "bytes") else "left", no_wrap=True)
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(escape(tensor.name), tensor.quant_type.name, shape, str(tensor.offset), str(tensor.num_bytes))
    return table


def _type_bytes(gguf: GGUFFile) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        sizes[tensor.quant_type.name] += tensor.num_bytes
    return dict(sizes)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _is_array(value: MetadataValue) -> bool:
    return not isinstance(value, str | bool | int | float)


def _json_value(value: MetadataValue) -> Any:
    if not _is_array(value):
        return value
    items = [item.item() if isinstance(item, np.generic) else item for item in value[:SHOWN_ITEMS]]  # type: ignore[index]
    return {"length": len(value), "first": items}  # type: ignore[arg-type]


def _shown(value: MetadataValue) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"  # as float32 has it
    if not _is_array(value):
        text = repr(value) if isinstance(value, str) else str(value)
        return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"
    document = _json_value(value)
    items = ", ".join(map(repr, document["first"]))
    more = ", ..." if document["length"] > SHOWN_ITEMS else ""
    return f"[{document['length']}] {items}{more}"
