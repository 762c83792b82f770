"""The helper process that renders chat templates, which come with a model file and may be hostile.

Runs as a script of its own, isolated, and imports nothing of strata. It reads requests from stdin and writes answers to
stdout, each a 4-byte big-endian length and that much JSON. Memory and processor time are limited before the first
template is read; templates run in Jinja's immutable sandbox. Knows nothing about models or tokens.

Request: `source`, `variables`, `output_characters`, `cpu_s`. Answer: `text`, or `error` with `kind`, which is one of
`syntax`, `refused` (the template's own raise_exception), `security`, `memory`, `output` and `failed`.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

HAS_LIMITS = importlib.util.find_spec("resource") is not None
if HAS_LIMITS:  # elsewhere the parent says so and keeps to its timeout
    import resource

MESSAGE_CHARACTERS = 400


class RefusedError(TemplateError):
    """What `raise_exception` in a template raises."""


class OutputLimitError(Exception):
    """A template wrote more than is allowed."""


class Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; here its content is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that published templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: object) -> None:
    """Ends the rendering with the template's own message."""
    raise RefusedError(str(message))


def strftime_now(form: str) -> str:
    """The local time."""
    return datetime.now().strftime(form)


def render(environment: ImmutableSandboxedEnvironment, request: Mapping[str, Any]) -> str:
    """The rendered text; `OutputLimitError` where it grows beyond the request's bound."""
    room = request["output_characters"]
    pieces = []
    for piece in environment.from_string(request["source"]).generate(**request["variables"]):
        pieces.append(piece)
        room -= len(piece)
        if room < 0:
            raise OutputLimitError
    return "".join(pieces)


def answer(environment: ImmutableSandboxedEnvironment, request: Mapping[str, Any]) -> dict[str, str]:
    """The answer to one request, whatever the template does."""
    try:
        return {"text": render(environment, request)}
    except TemplateSyntaxError as error:
        return _failure("syntax", f"line {error.lineno}: {error.message}")
    except RefusedError as error:
        return _failure("refused", error)
    except SecurityError as error:
        return _failure("security", error)
    except MemoryError:
        return _failure("memory", "")
    except OutputLimitError:
        return _failure("output", "")
    except RecursionError:
        return _failure("failed", "it calls itself without end or is nested too deeply")
    except Exception as error:  # noqa: BLE001 - a template can raise anything, and all of it is the user's to see
        return _failure("failed", f"{type(error).__name__}: {error}")


def _failure(kind: str, message: object) -> dict[str, str]:
    return {"kind": kind, "error": str(message)[:MESSAGE_CHARACTERS]}


def limit_memory(memory_bytes: int) -> bool:
    """Bounds this process's memory and forbids it files; False where the platform has no such limits."""
    if not HAS_LIMITS:
        return False
    for name, bound in (
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_DATA", memory_bytes),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
    ):
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (bound, bound))
    return True


def limit_cpu(cpu_s: int) -> None:
    """Bounds the processor time of the next request; the system ends the process beyond it."""
    if HAS_LIMITS:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + cpu_s, hard))


def read_frame(stream: BinaryIO) -> Any:
    """One JSON value, or None at the end of the stream."""
    header = stream.read(4)
    return json.loads(stream.read(int.from_bytes(header, "big"))) if len(header) == 4 else None


def write_frame(stream: BinaryIO, value: object) -> None:
    """One JSON value; lone surrogates survive as escapes."""
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def serve(requests: BinaryIO, answers: BinaryIO, memory_bytes: int) -> None:
    """Says whether memory is limited, then answers until the requests end."""
    write_frame(answers, {"limited": limit_memory(memory_bytes)})
    environment = make_environment()
    while (request := read_frame(requests)) is not None:
        limit_cpu(request["cpu_s"])
        write_frame(answers, answer(environment, request))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[2]))
