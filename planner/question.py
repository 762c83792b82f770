"""What a plan is asked for: a model, a machine, and what the user wants of them. Changed and asked again by what-if.

Knows nothing about how plans are found. A question for this machine carries its profile; one for a machine that is
elsewhere carries its description instead.
"""

from dataclasses import dataclass, replace

from cpu_kernels.kv_policy import F16_POLICY, KVPolicy
from cpu_kernels.reference.dequantize import dequantizable
from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import RequestError, UnsupportedModelError
from offload.gguf import GGUFFile
from planner.budget import Budget
from planner.kv import check_kv
from planner.machine import Machine
from planner.model_shape import ModelShape
from planner.plan import Objective, PlannedModel
from planner.profile import Profile
from planner.ways import AUTO, LLAMA_CPP, WAYS

MAX_CONTEXT_TOKENS = 1 << 24
MAX_THREADS = 4096


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants; None is chosen by the planner."""

    context_tokens: int | None = None
    threads: int | None = None
    prompt_tokens: int | None = None  # that speed is predicted for
    loop: str = AUTO
    objective: Objective = Objective.LATENCY
    kv: KVPolicy = F16_POLICY
    kv_ram_bytes: int | None = None  # for keys and values, the rest of which lies on flash
    kv_is_free: bool = False  # smaller types than those of `kv` may be taken where these do not fit

    def check(self) -> None:
        """RequestError for what no plan could have."""
        if self.context_tokens is not None and not 1 <= self.context_tokens <= MAX_CONTEXT_TOKENS:
            raise RequestError(f"a context of {self.context_tokens} tokens: it must be 1 to {MAX_CONTEXT_TOKENS}")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise RequestError(f"{self.threads} threads: it must be 1 to {MAX_THREADS}")
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise RequestError(f"a prompt of {self.prompt_tokens} tokens: it must be at least 1")
        if self.loop not in WAYS:
            raise RequestError(f"there is no loop {self.loop!r}", hint=f"choose one of {', '.join(WAYS)}")
        check_kv(self.kv, self.loop)


@dataclass(frozen=True, slots=True)
class Here:
    """This machine: what it measured, and its GPU."""

    profile: Profile
    gpu: GpuCapabilities | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """All that a plan depends on."""

    model: PlannedModel
    shape: ModelShape
    budget: Budget
    wish: Wish
    place: Here | Machine

    def with_kv(self, kv: KVPolicy) -> "Question":
        """The same, with keys and values kept by `kv` and nothing else."""
        return replace(self, shape=self.shape.with_kv(kv), wish=replace(self.wish, kv=kv, kv_is_free=False))

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes in the file, all tensors together."""
        return 8 * self.shape.num_bytes / max(self.shape.num_parameters, 1)


def ask(gguf: GGUFFile, budget: Budget, place: Here | Machine, wish: Wish) -> Question:
    """The question of where `gguf` runs; RequestError, or UnsupportedModelError for a type without kernels."""
    wish.check()
    shape = ModelShape.from_gguf(gguf, wish.kv)
    if wish.loop != LLAMA_CPP:
        _check_types(gguf)
    return Question(planned_model(gguf, shape), shape, budget, wish, place)


def planned_model(gguf: GGUFFile, shape: ModelShape) -> PlannedModel:
    """What plans tell of the model of `gguf`, whose shape it is."""
    return PlannedModel(
        path=str(gguf.path),
        byte_size=gguf.byte_size,
        architecture=shape.architecture,
        num_parameters=shape.num_parameters,
        active_parameters=shape.active_parameters,
        block_count=shape.block_count,
        context_length=shape.context_length,
        vocab_size=shape.vocab_size,
        expert_count=shape.expert_count,
        expert_used_count=shape.expert_used_count,
        tied_output=shape.tied_output,
    )


def _check_types(gguf: GGUFFile) -> None:
    for tensor in gguf.tensors.values():
        if not dequantizable(tensor.quant_type):
            raise UnsupportedModelError(
                f"{gguf.path}: {tensor.quant_type.name} of tensor {tensor.name} is not supported",
                hint="use a file of another quant type",
            )
