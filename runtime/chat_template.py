"""Chat messages to a prompt by the model's own template, rendered in a helper process that cannot do harm.

A template is a program that came with a download: it gets bounded memory, time and output, no files, and Jinja's
immutable sandbox (`runtime.chat_template_worker`). Whatever it does, `render` returns text or raises RequestError, and
the next render works. Knows nothing about tokens beyond the texts of BOS and EOS.
"""

import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from offload.closing import Closing
from offload.errors import RequestError
from offload.gguf import GGUFFile
from runtime.tokenizer import Tokenizer

KEY: Final = "tokenizer.chat_template"
HINT: Final = "give another template with --chat-template-file, or send text as it is with --raw"
MEMORY_BYTES: Final = 512 << 20
OUTPUT_CHARACTERS: Final = 16 << 20
ANSWER_BYTES: Final = 12 * OUTPUT_CHARACTERS + 4096
"""The longest JSON that text can come to: a character may be two escapes of six bytes."""
CPU_S: Final = 3
START_S: Final = 20.0
WORKER: Final = Path(__file__).with_name("chat_template_worker.py")
_KEPT_ENVIRONMENT: Final = ("LANG", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_BOOT: Final = "import runpy, sys; sys.path += sys.argv[3:]; runpy.run_path(sys.argv[1], run_name='__main__')"
logger = logging.getLogger("strata.chat_template")

_FAILURES: Final = {
    "syntax": "the chat template is not valid Jinja, {}",
    "refused": "the chat template refuses these messages: {}",
    "security": "the chat template tries what templates may not do: {}",
    "memory": f"the chat template needs more than {MEMORY_BYTES >> 20} MiB of memory",
    "output": f"the chat template writes more than {OUTPUT_CHARACTERS >> 20} Mi characters",
    "failed": "the chat template fails: {}",
}


class ChatTemplate(Closing):
    """A template and the process that renders it; started at the first use and kept. Safe to share between threads."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", timeout_s: float = 4.0) -> None:
        """`source` is Jinja; `timeout_s` bounds one rendering's wall-clock time, in seconds."""
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def from_gguf(cls, gguf: GGUFFile, tokenizer: Tokenizer, name: str | None = None) -> "ChatTemplate | None":
        """The file's template, or None if it has none; `name` picks a variant, RequestError if that is not there."""
        source = gguf.get_str(KEY if name is None else f"{KEY}.{name}", "")
        if source:
            return cls.for_tokenizer(source, tokenizer)
        if name is None:
            return None
        names = ", ".join(key.removeprefix(f"{KEY}.") for key in gguf.metadata if key.startswith(f"{KEY}."))
        raise RequestError(
            f"{gguf.path} has no chat template {name!r}", hint=f"it has these variants: {names or 'none'}"
        )

    @classmethod
    def for_tokenizer(cls, source: str, tokenizer: Tokenizer) -> "ChatTemplate":
        """A template that gets BOS and EOS from this tokenizer's vocabulary."""
        bos, eos = (
            "" if token_id is None else tokenizer.token_text(token_id)
            for token_id in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(source, bos_token=bos, eos_token=eos)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages` (`role`, `content` and what else the template reads); more through `variables`.

        RequestError names what the template, or the messages, did wrong.
        """
        values = {
            **self._tokens,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            **(variables or {}),
        }
        request = {"source": self.source, "variables": values, "output_characters": OUTPUT_CHARACTERS, "cpu_s": CPU_S}
        try:
            data = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            raise RequestError(f"the messages cannot be written as JSON: {error}") from error
        with self._lock:
            answer = self._exchange(data)
        if "text" not in answer:
            raise RequestError(_FAILURES[answer["kind"]].format(answer["error"]), hint=HINT)
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """Ends the helper process; may be called twice, and rendering starts a new one."""
        with self._lock:
            self._end()

    def _exchange(self, data: bytes) -> dict[str, Any]:
        """Sends a request and waits for its answer; a helper that gives none in time is ended."""
        process = self._process or self._start()
        answer = _talk(process, data, self._timeout_s)
        if answer is None:
            raise RequestError(f"the chat template was stopped: {self._end()}", hint=HINT)
        if answer.get("kind") == "memory":
            self._end()
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        """A helper that has said it is ready."""
        command = [sys.executable, "-I", "-S", "-c", _BOOT, str(WORKER), str(MEMORY_BYTES), *_library_folders()]
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the answer being written, not for this process
            )
        except OSError as error:
            raise RequestError(f"the process for chat templates does not start: {error}", hint=HINT) from error
        self._process = process
        ready = _talk(process, None, START_S)
        if ready is None:
            raise RequestError(f"the process for chat templates does not start: {self._end()}", hint=HINT)
        if not ready["limited"]:
            logger.warning("this platform cannot limit the memory of chat templates; only their time is limited")
        return process

    def _end(self) -> str:
        """Ends the process, if there is one, and says in words what had already ended it."""
        process, self._process = self._process, None
        if process is None:
            return "its process is gone"
        process.kill()
        for pipe in (process.stdin, process.stdout):
            _close(pipe)
        code = process.wait()
        if code == -signal.SIGKILL:
            return f"it took more than {self._timeout_s:g} s"
        if code == -getattr(signal, "SIGXCPU", 0):
            return f"it took more than {CPU_S} s of processor time"
        return f"its process ended with code {code}"


def _talk(process: subprocess.Popen[bytes], data: bytes | None, timeout_s: float) -> dict[str, Any] | None:
    """Sends `data`, if any, and returns the next answer, or None if the process ends or the time is up.

    Killing the process is what ends a write or read that waits for it.
    """
    if process.stdin is None or process.stdout is None:
        return None
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        if data is not None:
            process.stdin.write(len(data).to_bytes(4, "big") + data)
            process.stdin.flush()
        header = process.stdout.read(4)
        length = int.from_bytes(header, "big")
        body = process.stdout.read(length) if 0 < length <= ANSWER_BYTES else b""
    except BrokenPipeError:
        return None
    finally:
        timer.cancel()
    if len(body) < length or not body:
        return None
    answer: dict[str, Any] = json.loads(body)
    return answer


def _close(pipe: IO[bytes] | None) -> None:
    """Closes a pipe to a process that is gone; bytes it never took are lost with it."""
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _library_folders() -> list[str]:
    """Where the helper finds Jinja: it runs without site-packages, so that it sees nothing else of them by default."""
    origins = [spec.origin for name in ("jinja2", "markupsafe") if (spec := importlib.util.find_spec(name))]
    return list(dict.fromkeys(str(Path(origin).parents[1]) for origin in origins if origin))
