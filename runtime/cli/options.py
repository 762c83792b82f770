"""Options that several commands share, with llama.cpp's familiar names; each is declared here once.

Knows nothing of what the commands do with them.
"""

import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cpu_kernels.kv_policy import LEAST_BUDGET_TOKENS, KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import RequestError
from offload.prefetch_gate import PrefetchMode
from planner.budget import parse_size
from planner.gpu_choice import FOUND
from runtime.cli.remote_names import download_command, is_remote
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams

_MODEL_PANEL = "Model and machine"
_SAMPLING_PANEL = "Sampling"


class LoopChoice(StrEnum):
    """Loops that compute a step."""

    AUTO = "auto"
    HYBRID = "hybrid"
    PROGRAM = "program"
    SEQUENTIAL = "sequential"


class EngineChoice(StrEnum):
    """Runtimes that compute logits."""

    STRATA = "strata"
    LLAMA_CPP = "llama.cpp"


def _option(panel: str, *names: str, help: str, **settings: Any) -> Any:  # noqa: A002 - typer's own word
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


Model = Annotated[
    str,
    _option(
        _MODEL_PANEL, "-m", "--model", help="A GGUF file (the first shard of several), or `demo`: the built-in model."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="Write what was done when here, for chrome://tracing or Perfetto.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No plan and no speeds on stderr.")]
MaxTokens = Annotated[
    int | None,
    typer.Option("-n", "--predict", help="Most tokens to generate; without it, until the answer ends.", min=1),
]


Context = Annotated[int | None, _option(_MODEL_PANEL, "-c", "--ctx-size", min=1, help="Tokens of context to reserve.")]
Threads = Annotated[int | None, _option(_MODEL_PANEL, "-t", "--threads", min=1, help="CPU threads.")]
BudgetText = Annotated[str | None, _option(_MODEL_PANEL, "--budget", help="What may be used, e.g. ram=8GiB,gpu=4GiB.")]
Loop = Annotated[
    LoopChoice,
    _option(_MODEL_PANEL, "--loop", help="How a step is computed: GPU and CPU, CPU alone, or the slow reference."),
]
Gpu = Annotated[
    str,
    _option(_MODEL_PANEL, "--gpu", help="off, auto, or one to simulate: sim:vram=4GiB,bw=192GB/s,link=6GB/s,tflops=6."),
]


class CacheType(StrEnum):
    """Types of the KV cache that may be asked for."""

    AUTO = "auto"
    F16 = KVType.F16
    BF16 = KVType.BF16
    Q8_0 = KVType.Q8_0
    Q4_0 = KVType.Q4_0
    KIVI4 = KVType.KIVI4
    KIVI2 = KVType.KIVI2

    @property
    def kind(self) -> KVType:
        """The type; f16 for one that may be chosen."""
        return KVType.F16 if self is CacheType.AUTO else KVType(self.value)


CacheTypeK = Annotated[
    CacheType,
    _option(
        _MODEL_PANEL,
        "-ctk",
        "--cache-type-k",
        help="Type of the KV cache's keys; auto: f16, or less where the context does not fit in RAM else.",
    ),
]
CacheTypeV = Annotated[
    CacheType, _option(_MODEL_PANEL, "-ctv", "--cache-type-v", help="Type of the KV cache's values, likewise.")
]


KVBudget = Annotated[
    int | None,
    _option(
        _MODEL_PANEL,
        "--kv-budget",
        min=LEAST_BUDGET_TOKENS,
        metavar="TOKENS",
        help="New tokens choose so many of the KV cache to read, with neighbors at most twice as many. "
        "Can change answers. Without it all are read.",
    ),
]
KVRam = Annotated[
    str | None,
    _option(
        _MODEL_PANEL,
        "--kv-ram",
        metavar="SIZE",
        help="RAM for the KV cache, e.g. 512MiB; the rest of it goes to flash. Without it, as planned.",
    ),
]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan is made for."""

    model: Model
    context: Context = None
    threads: Threads = None
    budget: BudgetText = None
    loop: Loop = LoopChoice.AUTO
    gpu: Gpu = FOUND
    cache_type_k: CacheTypeK = CacheType.AUTO
    cache_type_v: CacheTypeV = CacheType.AUTO
    kv_budget: KVBudget = None
    kv_ram: KVRam = None

    @property
    def kv_ram_bytes(self) -> int | None:
        """RAM that keys and values may take; RequestError for what is no size."""
        return None if self.kv_ram is None else parse_size(self.kv_ram)

    @property
    def kv(self) -> KVPolicy:
        """What layers shall keep keys and values in."""
        return KVPolicy(self.cache_type_k.kind, self.cache_type_v.kind, budget_tokens=self.kv_budget)

    @property
    def kv_is_free(self) -> bool:
        """Whether the planner may choose the types."""
        return self.cache_type_k is self.cache_type_v is CacheType.AUTO


@dataclass(frozen=True, slots=True)
class LaunchOptions(PlanOptions):
    """Where and how a model runs."""

    plan_file: Annotated[
        Path | None, _option(_MODEL_PANEL, "--plan", help="Run by a plan saved with `strata plan --save`.")
    ] = None
    engine: Annotated[
        EngineChoice, _option(_MODEL_PANEL, "--engine", help="Own engine, or llama.cpp (the extra `peer`).")
    ] = EngineChoice.STRATA
    template_file: Annotated[
        Path | None,
        _option(_MODEL_PANEL, "--chat-template-file", help="Jinja template in place of the file's own."),
    ] = None
    prefetch: Annotated[
        PrefetchMode, _option(_MODEL_PANEL, "--prefetch", help="Read experts from flash on a guess; auto: if it pays.")
    ] = PrefetchMode.AUTO

    @property
    def loop_name(self) -> str:
        """The loop that the planner is asked for: another engine's own where one was chosen."""
        return self.loop.value if self.engine is EngineChoice.STRATA else self.engine.value


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How a token is drawn from its logits."""

    temperature: Annotated[float, _option(_SAMPLING_PANEL, "--temp", help="0 takes the likeliest token.")] = 0.8
    top_k: Annotated[int, _option(_SAMPLING_PANEL, "--top-k", help="0 keeps all.")] = 40
    top_p: Annotated[float, _option(_SAMPLING_PANEL, "--top-p", help="1 keeps all.")] = 0.95
    min_p: Annotated[float, _option(_SAMPLING_PANEL, "--min-p", help="0 keeps all.")] = 0.05
    repeat_penalty: Annotated[float, _option(_SAMPLING_PANEL, "--repeat-penalty", help="1 is off.")] = 1.0
    presence_penalty: Annotated[float, _option(_SAMPLING_PANEL, "--presence-penalty", help="0 is off.")] = 0.0
    frequency_penalty: Annotated[float, _option(_SAMPLING_PANEL, "--frequency-penalty", help="0 is off.")] = 0.0
    seed: Annotated[
        int | None,
        _option(_SAMPLING_PANEL, "-s", "--seed", help="Same seed, same text; -1: random, as without it."),
    ] = None
    stop: Annotated[
        list[str], _option(_SAMPLING_PANEL, "--stop", help="End the answer before this text; may be repeated.")
    ] = field(default_factory=list)

    def params(self) -> SamplingParams:
        """The same as the sampler takes it; RequestError for a value out of range."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed == -1 else self.seed,
        )


def model_path(name: str) -> Path:
    """The file that -m names; `demo` is the model inside the package unless a file of that name is there."""
    path = Path(name)
    if name == "demo" and not path.exists():
        return DEMO_MODEL
    if is_remote(name):
        raise RequestError(
            f"{name} lies on a server, and weights are read from local files", hint=f"first: {download_command(name)}"
        )
    if not path.is_file():
        raise RequestError(f"there is no file {name}", hint="give the path of a GGUF file, or `-m demo`")
    return path


def read_text_file(path: Path) -> str:
    """The whole of a UTF-8 text file, line ends as they are; `-` reads stdin."""
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
