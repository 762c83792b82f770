"""The flags with which llama.cpp comes nearest to a plan: layers and experts on the GPU, KV type, threads, context.

The one place that turns a plan into llama.cpp's terms: what is printed is also what the executor loads by.

llama.cpp puts the last layers on the GPU (`-ngl`), the output with them once there is one more than the model has, and
can hold back single tensors by their names (`-ot REGEX=CPU`), the stacked experts of the first layers in short
(`--n-cpu-moe`). It knows no placement on flash: what lies there stays a mapped file. Knows nothing about how plans are
made. Source: llama.cpp's `common/arg.cpp` and `src/llama-model.cpp`.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from cpu_kernels.kv_policy import EDGE_TYPE
from cpu_kernels.kv_types import KVType
from offload.remote_file import HUB_PREFIX
from offload.tiers import Device, Tier
from planner.hybrid_hits import evened_slots
from planner.kv import LLAMA_CPP_TYPES
from planner.model_shape import UnitKind
from planner.plan import Placement, Plan

# Tensors of a unit, as llama.cpp matches them: by a regular expression found anywhere in the name. A router, which is
# small, goes with its layer.
_TENSORS = {
    UnitKind.ATTENTION: r"attn_",
    UnitKind.DENSE_FFN: r"ffn_(up|down|gate)\.",
    UnitKind.EXPERTS: r"ffn_(up|down|gate|gate_up)_(ch|)exps",
    UnitKind.SHARED_EXPERT: r"ffn_.*shexp",
}

Unit = tuple[int | None, UnitKind]


@dataclass(frozen=True, slots=True)
class LlamaCppFlags:
    """What llama.cpp is told; `unlike` says where it cannot follow the plan."""

    model: str
    gpu_layers: int  # the output counts as one, and is the first to go there
    cpu_expert_layers: int  # the first layers whose experts stay in RAM
    cpu_tensors: tuple[str, ...]  # regular expressions of further tensors that stay in RAM
    key_type: str
    value_type: str
    threads: int
    context_tokens: int
    batch_tokens: int  # of a prompt in one step
    mmap: bool  # not in the line: versions spell it differently (--no-mmap, --load-mode none), and all map by default
    unlike: tuple[str, ...] = ()

    def held_back(self) -> tuple[str, ...]:
        """A regular expression for each tensor, or group of them, that `--n-cpu-moe` and `-ot` keep in RAM."""
        experts = (_pattern(UnitKind.EXPERTS, [layer]) for layer in range(self.cpu_expert_layers))
        return (*experts, *self.cpu_tensors)

    def arguments(self) -> tuple[str, ...]:
        """The flags with their values, for llama-cli and llama-server alike."""
        moe = ("--n-cpu-moe", str(self.cpu_expert_layers)) if self.cpu_expert_layers else ()
        tensors = ("-ot", ",".join(f"{pattern}=CPU" for pattern in self.cpu_tensors)) if self.cpu_tensors else ()
        kv = ("-ctk", self.key_type, "-ctv", self.value_type)
        batch = str(self.batch_tokens)
        numbers = ("-t", str(self.threads), "-c", str(self.context_tokens), "-b", batch, "-ub", batch)
        return (*self._model_arguments(), "-ngl", str(self.gpu_layers), *moe, *tensors, *kv, *numbers)

    def _model_arguments(self) -> tuple[str, ...]:
        """The model by its path, or as llama.cpp is told to download it."""
        if self.model.startswith(HUB_PREFIX):
            owner, repo, file = self.model.removeprefix(HUB_PREFIX).split("/", 2)
            return ("-hf", f"{owner}/{repo}", "-hff", file)
        return ("-mu" if self.model.startswith(("https://", "http://")) else "-m", self.model)

    def line(self) -> str:
        """One line to paste behind `llama-cli` or `llama-server`, quoted for the shell."""
        return shlex.join(self.arguments())


def llama_cpp_flags(plan: Plan) -> LlamaCppFlags:
    """The flags nearest to `plan`."""
    on_gpu = _with_slots(plan, _units_on_gpu(plan.placements))
    layers = plan.model.block_count
    first = min((layer for (layer, _), here in on_gpu.items() if here and layer is not None), default=layers)
    output = on_gpu.get((None, UnitKind.OUTPUT), False)
    held_back = {
        (layer, kind): layer >= first and not here
        for (layer, kind), here in on_gpu.items()
        if layer is not None and kind in _TENSORS
    }
    moe = _first_expert_layers(held_back, first)
    named = [unit for unit, back in held_back.items() if back and (unit[1] is not UnitKind.EXPERTS or unit[0] >= moe)]
    patterns = [_pattern(kind, [layer for layer, its in named if its is kind]) for kind in _TENSORS]
    if first < layers and not output:
        patterns.append(r"^output\.weight")
    return LlamaCppFlags(
        model=plan.model.path,
        gpu_layers=layers - first + 1 if first < layers else int(output),
        cpu_expert_layers=moe,
        cpu_tensors=tuple(pattern for pattern in patterns if pattern),
        key_type=_nearest(plan.settings.cache_type_k).value,
        value_type=_nearest(plan.settings.cache_type_v).value,
        threads=plan.settings.threads,
        context_tokens=plan.settings.context_tokens,
        batch_tokens=plan.settings.prefill_chunk_tokens,
        mmap=any(placement.tier is Tier.FLASH for placement in plan.placements),
        unlike=tuple(chain(_unlike(plan, on_gpu), _unlike_kv(plan))),
    )


def _units_on_gpu(placements: Sequence[Placement]) -> dict[Unit, bool]:
    """Whether all of a unit, every class of its experts, lies in GPU memory."""
    units: dict[Unit, bool] = {}
    for placement in placements:
        key = placement.layer, placement.kind
        units[key] = units.get(key, True) and placement.tier is Tier.GPU
    return units


def _with_slots(plan: Plan, on_gpu: dict[Unit, bool]) -> dict[Unit, bool]:
    """`on_gpu`, with the experts of as many of the last layers there as slots that experts share could hold."""
    count = plan.model.expert_count
    sharing = [
        layer
        for (layer, kind), here in on_gpu.items()
        if kind is UnitKind.EXPERTS and not here and on_gpu.get((layer, UnitKind.ROUTER), False)
    ]
    resident = sum(here for (_, kind), here in on_gpu.items() if kind is UnitKind.EXPERTS)
    whole = max(plan.settings.gpu_slots // count - resident, 0) if count else 0
    moved = sharing[len(sharing) - whole :]
    return on_gpu | {(layer, UnitKind.EXPERTS): True for layer in moved}


def _first_expert_layers(held_back: Mapping[tuple[int, UnitKind], bool], first: int) -> int:
    """N of `--n-cpu-moe N`: the layers until the first, of those on the GPU, whose experts are there too."""
    last = -1
    for (layer, kind), back in sorted(held_back.items()):
        if kind is UnitKind.EXPERTS and layer >= first:
            if not back:
                break
            last = layer
    return last + 1


def _pattern(kind: UnitKind, layers: Sequence[int]) -> str:
    """A regular expression of the tensors of `kind` in `layers`; empty without layers."""
    return rf"blk\.({'|'.join(str(layer) for layer in sorted(layers))})\.{_TENSORS[kind]}" if layers else ""


def _nearest(kind: KVType) -> KVType:
    """llama.cpp's type of as many bits, or the smallest it has."""
    return kind if kind in LLAMA_CPP_TYPES else KVType.Q4_0


def _unlike_kv(plan: Plan) -> Iterator[str]:
    """Where the types of the KV cache differ."""
    types = plan.settings.cache_type_k, plan.settings.cache_type_v
    for kind in dict.fromkeys(kind for kind in types if kind not in LLAMA_CPP_TYPES):
        yield f"llama.cpp has no {kind}: it keeps keys or values as {_nearest(kind)} instead"
    if any(kind.bits < EDGE_TYPE.bits for kind in types):
        yield f"llama.cpp keeps every layer so, first and last too, which the plan keeps as {EDGE_TYPE}"


def _unlike(plan: Plan, on_gpu: Mapping[Unit, bool]) -> Iterator[str]:
    """Where llama.cpp does otherwise, in a line each."""
    placements = plan.placements
    if evened_slots(plan):
        yield "llama.cpp holds whole layers of experts on the GPU, where the plan has slots for those used most"
    if any(placement.tier is Tier.FLASH for placement in placements):
        yield "llama.cpp has no placement on flash: what does not fit is paged in from the mapped file"
    if any(placement.tier is not Tier.GPU and placement.device is Device.GPU for placement in placements):
        yield "llama.cpp computes on the CPU what it holds in RAM, but for long prompts"
    if any(p.tier is Tier.GPU and not on_gpu[p.layer, p.kind] for p in placements):
        yield "llama.cpp holds all experts of a layer in one memory: layers that the plan divides are in RAM"
    if any(
        here != on_gpu.get((la, UnitKind.KV), here) for (la, ki), here in on_gpu.items() if ki is UnitKind.ATTENTION
    ):
        yield "llama.cpp holds the KV cache of a layer where the layer is"
