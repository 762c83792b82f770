"""The plan: where every unit lies and what computes it, with settings, bytes needed and the predicted speed.

A value that is written to and read from JSON without loss. Knows nothing about how a plan is found or carried out.
Invariants, checked at every reading: sizes are not negative, what is needed is within the budget, names are unique.
A plan for another machine than this one is for looking at: it is simulated, not run.
"""

from dataclasses import dataclass
from enum import StrEnum

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from cpu_kernels.tuning import Tuning
from offload.errors import PlanError
from offload.gguf import GGUFFile
from offload.tiers import Device, Tier
from planner import document
from planner.budget import Budget
from planner.gpu_choice import is_simulated
from planner.kv import check_kv
from planner.model_shape import UnitKind
from planner.planned_draft import PlannedDraft
from planner.prediction import Prediction

FORMAT_VERSION = 7
SPILLING_LOOPS = "program", "hybrid"  # that read keys and values from flash


class Objective(StrEnum):
    """What a plan is made quick at: the next token, many tokens in all, or the first one."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    TTFT = "ttft"


class WeightsForm(StrEnum):
    """How weights are held: as float32 made once while loading; as in the file and made float32 on every use; or in the
    file's own numbers, packed for kernels that multiply with them as they are."""

    FLOAT32 = "float32"
    QUANTISED = "quantised"
    PACKED = "packed"


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The file a plan is for, and what the plan tells of it."""

    path: str
    byte_size: int
    architecture: str
    num_parameters: int
    active_parameters: int
    block_count: int
    context_length: int
    vocab_size: int
    expert_count: int
    expert_used_count: int
    tied_output: bool

    @property
    def key(self) -> str:
        """Names the model in the profile's corrections, wherever its file lies."""
        return f"{self.architecture}-{self.num_parameters}-{self.byte_size}"


@dataclass(frozen=True, slots=True)
class PlannedMachine:
    """The machine a plan is for. Only plans for the machine they were made on (`here`) can be run by.

    `gpu` names the GPU that the plan uses, and says "simulated" where it is; None where it uses none.
    """

    name: str
    source: str
    here: bool
    gpu: str | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """One unit: `num_bytes` it takes in `tier`, in the form the settings name; `device` computes it."""

    unit: str
    kind: UnitKind
    layer: int | None
    num_bytes: int
    tier: Tier
    device: Device


@dataclass(frozen=True, slots=True)
class Settings:
    """What the executor is told besides the placements."""

    context_tokens: int
    prefill_chunk_tokens: int
    threads: int
    weights_form: WeightsForm
    loop: str
    device: str  # of units computed on the GPU: torch's name, or a simulated one's description; else "cpu"
    stream_slots: int = 0  # places in RAM for experts, or a dense model's layers, that flash brings; 0: RAM has all
    gpu_slots: int = 0  # places in the GPU's memory for experts, of all layers together
    gpu_kv_tokens: int | None = None  # of each of the GPU's caches, the older ones being in RAM; None: all
    tuning: Tuning | None = None  # the kernels of packed weights; None: the usual ones
    cache_type_k: KVType = KVType.F16  # of all layers but the first and the last, which have at least 8 bits
    cache_type_v: KVType = KVType.F16
    kv_ram_bytes: int | None = None  # for keys and values, the rest of which lies on flash; None: RAM has all
    kv_budget_tokens: int | None = None  # that a new token chooses to read of a KV head; None: all

    @property
    def kv(self) -> KVPolicy:
        """What layers keep keys and values in, and how much of it is read."""
        return KVPolicy(self.cache_type_k, self.cache_type_v, budget_tokens=self.kv_budget_tokens)


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes one memory must hold at the worst moment, by what they are for; `margin_bytes` stay free."""

    weights_bytes: int = 0
    slots_bytes: int = 0  # of weights that come and go
    kv_bytes: int = 0
    activations_bytes: int = 0  # of the largest prefill chunk
    buffers_bytes: int = 0  # reading and dequantising
    vocabulary_bytes: int = 0
    process_bytes: int = 0  # interpreter and libraries
    margin_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """All but the margin: what the process is expected to hold."""
        return self.needed_bytes - self.margin_bytes

    @property
    def needed_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.slots_bytes
            + self.kv_bytes
            + self.activations_bytes
            + self.buffers_bytes
            + self.vocabulary_bytes
            + self.process_bytes
            + self.margin_bytes
        )


@dataclass(frozen=True, slots=True)
class Needs:
    """What a plan needs of each memory."""

    ram: MemoryNeeds
    gpu: MemoryNeeds


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the executor needs to know, and everything a user may ask about it."""

    version: int
    model: PlannedModel
    machine: PlannedMachine
    objective: Objective
    placements: tuple[Placement, ...]
    settings: Settings
    budget: Budget
    needs: Needs
    predicted: Prediction
    notes: tuple[str, ...] = ()
    draft: PlannedDraft | None = None  # for which its memory was set aside before the budget

    @property
    def is_simulated(self) -> bool:
        """Whether the GPU of the plan is simulated: then so are its speeds."""
        return is_simulated(self.settings.device)

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return document.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan written in `text`; PlanError naming the place where it is not a plan this version can carry out."""
        try:
            plan = document.loads(cls, text)
        except ValueError as error:
            raise PlanError(f"not a plan: {error}", hint="write one with `strata plan --save`") from error
        if plan.version != FORMAT_VERSION:
            raise PlanError(
                f"version: the plan is of format {plan.version}; this version reads format {FORMAT_VERSION}",
                hint="write it again with `strata plan --save`",
            )
        plan.check()
        return plan

    def checked_for(self, gguf: GGUFFile) -> "Plan":
        """This plan; PlanError if it was made for another model than `gguf`."""
        model, tensors = self.model, gguf.tensors.values()
        here = (gguf.architecture, sum(tensor.num_elements for tensor in tensors), gguf.byte_size)
        if here != (model.architecture, model.num_parameters, model.byte_size):
            raise PlanError(
                f"the plan is for {model.path} ({model.architecture}, {model.byte_size} bytes), "
                f"not for {gguf.path} ({here[0]}, {here[2]} bytes)",
                hint="plan again with `strata plan`",
            )
        return self

    def check(self) -> None:
        """PlanError if the plan contradicts itself: which field, what is wrong with it, what would be right."""
        names: dict[str, int] = {}
        for index, placement in enumerate(self.placements):
            where = f"placements[{index}]"
            if placement.unit in names:
                raise PlanError(
                    f"{where}.unit: {placement.unit} is placed twice, first at placements[{names[placement.unit]}]",
                    hint="every unit has one tier and one device",
                )
            names[placement.unit] = index
            if placement.num_bytes < 0:
                raise PlanError(f"{where}.num_bytes is {placement.num_bytes}: negative; it must be at least 0")
            if (placement.tier, placement.device) == (Tier.GPU, Device.CPU):
                raise PlanError(f"{where}.device is cpu: what is held in gpu memory is computed by the gpu")
        settings = self.settings
        for name in ("context_tokens", "prefill_chunk_tokens", "threads"):
            if getattr(settings, name) < 1:
                raise PlanError(f"settings.{name} is {getattr(settings, name)}; it must be at least 1")
        for name in ("stream_slots", "gpu_slots"):
            if getattr(settings, name) < 0:
                raise PlanError(f"settings.{name} is {getattr(settings, name)}; it must be at least 0")
        for name in ("kv_ram_bytes", "gpu_kv_tokens"):
            if getattr(settings, name) is not None and getattr(settings, name) < 1:
                raise PlanError(f"settings.{name} is {getattr(settings, name)}; it must be at least 1")
        if settings.kv_ram_bytes is not None and settings.loop not in SPILLING_LOOPS:
            raise PlanError(
                f"settings.kv_ram_bytes is {settings.kv_ram_bytes}; the {settings.loop} loop has all of them in memory",
                hint="plan with --loop program, or leave out --kv-ram",
            )
        check_kv(settings.kv, settings.loop)
        self._check_memories()

    def _check_memories(self) -> None:
        """PlanError where more is placed than needed, or more needed than may be used."""
        for tier, needs, available in (
            (Tier.RAM, self.needs.ram, self.budget.ram_bytes),
            (Tier.GPU, self.needs.gpu, self.budget.gpu_bytes),
        ):
            placed = sum(p.num_bytes for p in self.placements if p.tier is tier)
            accounted = needs.weights_bytes + needs.kv_bytes
            if placed > accounted:
                raise PlanError(
                    f"{placed} bytes are placed in {tier.value}, more than needs.{tier.value} accounts for: "
                    f"weights_bytes and kv_bytes are {accounted} together",
                    hint="plan again with `strata plan`",
                )
            if needs.needed_bytes > available:
                raise PlanError(
                    f"the plan needs {needs.needed_bytes} bytes of {tier.value}; its budget is {available}",
                    hint="plan again with `strata plan`",
                )
