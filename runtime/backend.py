"""The one place that turns a plan into an executor: strata's programs, with a GPU or without, its reference loop, or
llama.cpp.

Each loop brings libraries that take their time to import, so each is imported when a plan names it.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpu_kernels.tuning import Tuning
from offload.errors import DeviceError, PlanError
from offload.expert_rates import ExpertRates
from offload.gguf import GGUFFile
from planner import gpu_products
from planner.folders import spill_folder, stores_folder
from planner.hybrid_memory import kv_tokens
from planner.hybrid_needs import brought_slots
from planner.hybrid_rates import expert_rates
from planner.hybrid_split import split_of
from planner.model_shape import ModelShape
from planner.plan import Plan, Settings, WeightsForm
from planner.solve import question_of
from planner.spread import machine_of
from planner.ways import HYBRID, LLAMA_CPP, PROGRAM, SEQUENTIAL
from runtime.architectures import Model, describe
from runtime.executor.base import Executor

if TYPE_CHECKING:
    from cpu_kernels.isa import ISA
    from gpu_kernels.device import GpuDevice
    from gpu_kernels.kernels import Kernels
    from runtime.executor.hybrid.executor import HybridExecutor
    from runtime.executor.program.kv_tiers import KVTiers
    from runtime.streamed import StreamedWeights

log = logging.getLogger("strata.backend")

Progress = Callable[[int, int], None]


def make_executor(gguf: GGUFFile, plan: Plan, *, on_load: Progress | None) -> Executor:
    """Load the weights where the plan puts them, for the loop it names.

    Raises `PlanError` for a loop that is none, `UnsupportedModelError` for an architecture or quant type that the loop
    does not know.
    """
    if plan.settings.loop == LLAMA_CPP:
        from runtime.executor.llama_cpp import LlamaCppExecutor  # noqa: PLC0415

        return LlamaCppExecutor(gguf, plan)
    if plan.settings.loop == HYBRID:
        return hybrid_executor(gguf, plan, on_load=on_load)
    loops = {PROGRAM: _program, SEQUENTIAL: _sequential}
    make = loops.get(plan.settings.loop)
    if make is None:
        raise PlanError(
            f"settings.loop is {plan.settings.loop!r}; it must be one of {', '.join((*loops, LLAMA_CPP))}",
            hint="plan again with `strata plan`",
        )
    return make(gguf, describe(gguf), plan.settings, on_load)


def hybrid_executor(
    gguf: GGUFFile, plan: Plan, *, on_load: Progress | None = None, kernels: "Kernels | None" = None
) -> "HybridExecutor":
    """The executor of a hybrid plan, loaded and warm; `kernels` in place of those that suit the GPU.

    DeviceError where there is no such GPU; else as `make_executor`.
    """
    from cpu_kernels.isa import current as current_isa  # noqa: PLC0415
    from gpu_kernels.devices import open_device  # noqa: PLC0415 - brings torch
    from runtime.executor.hybrid.executor import HybridExecutor  # noqa: PLC0415 - brings torch, llvmlite and numba
    from runtime.executor.hybrid.placement import HybridPlacement  # noqa: PLC0415

    model, settings, isa = describe(gguf), plan.settings, current_isa()
    shape, tuning = ModelShape.from_gguf(gguf, settings.kv), _followed(settings.tuning, isa)
    split = split_of(shape, plan.placements, settings.gpu_slots, settings.gpu_kv_tokens)
    room = plan.budget.gpu_bytes - plan.needs.gpu.process_bytes
    try:
        device = open_device(settings.device, limit_bytes=room)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise DeviceError(f"{settings.device} cannot be used: {error}", hint="run it with --gpu off") from error
    executor = HybridExecutor(
        model,
        gguf,
        HybridPlacement.of(split, split.seeds(shape), brought_slots(shape, plan.budget, split)),
        device,
        threads=settings.threads,
        chunk_tokens=settings.prefill_chunk_tokens,
        context_tokens=kv_tokens(settings.context_tokens),
        isa=isa,
        tuning=tuning,
        streamed=_streamed(gguf, model, isa, settings, tuning) if settings.stream_slots else None,
        kernels=kernels or _gpu_kernels(gguf, device),
        rates=_hybrid_rates(gguf, plan),
        kv_policy=settings.kv,
        kv_tiers=_kv_tiers(model, settings),
        on_load=on_load,
    )
    executor.warm_up()
    return executor


def _gpu_kernels(gguf: GGUFFile, device: "GpuDevice") -> "Kernels":
    """Those that suit the GPU, with ways of the model's products that are measured once and kept."""
    from gpu_kernels.dispatch import Measured, kernels_for  # noqa: PLC0415 - brings torch

    if device.is_simulated:
        return kernels_for(str(device.torch_device), is_simulated=True)
    known = gpu_products.known_ways(device.name)
    measured = Measured(gpu_products.shapes_of(gguf), dict(known))
    kernels = kernels_for(str(device.torch_device), measured=measured)
    if measured.ways != known:
        gpu_products.keep_ways(device.name, measured.ways)
    return kernels


def _hybrid_rates(gguf: GGUFFile, plan: Plan) -> ExpertRates | None:
    """By which experts are brought to the GPU for a step; None where there are none to be brought."""
    question = question_of(plan, gguf)
    settings = plan.settings
    rates = expert_rates(question.shape, machine_of(question), settings.threads, streams=settings.stream_slots > 0)
    return rates if plan.settings.gpu_slots else None


def _program(gguf: GGUFFile, model: Model, settings: Settings, on_load: Progress | None) -> Executor:
    from cpu_kernels.isa import current as current_isa  # noqa: PLC0415
    from runtime.executor.program.executor import (  # noqa: PLC0415 - brings llvmlite and numba
        CHUNK_TOKENS,
        ProgramExecutor,
    )
    from runtime.panels import PanelWeights  # noqa: PLC0415

    isa, threads = current_isa(), settings.threads
    tuning = _followed(settings.tuning, isa)
    streamed = _streamed(gguf, model, isa, settings, tuning) if settings.stream_slots else None
    weights = PanelWeights(gguf, model, isa=isa, threads=threads, streamed=streamed, tuning=tuning)
    weights.load(on_load)
    executor = ProgramExecutor(
        model,
        weights,
        threads=threads,
        chunk_tokens=CHUNK_TOKENS if streamed is None else settings.prefill_chunk_tokens,
        kv_policy=settings.kv,
        kv_tiers=_kv_tiers(model, settings),
    )
    executor.warm_up()
    return executor


def _kv_tiers(model: Model, settings: Settings) -> "KVTiers | None":
    """Where keys and values lie that RAM shall not hold; None where it holds all."""
    from offload.kv_chunks import ChunkStore  # noqa: PLC0415 - as what they are for
    from offload.kv_spill import SpillFile  # noqa: PLC0415
    from runtime.executor.program.kv_tiers import KVTiers  # noqa: PLC0415 - brings llvmlite and numba

    if settings.kv_ram_bytes is None:
        return None
    shape = (model.block_count, model.head_count_kv, model.key_length, model.value_length, settings.context_tokens)
    slot_bytes = max(layout.chunk_bytes for layout in settings.kv.layouts(*shape))
    spill = SpillFile(spill_folder(), slot_bytes, in_parts=settings.kv_budget_tokens is not None)
    return KVTiers(ChunkStore(spill), settings.kv_ram_bytes, [layer.sliding_window for layer in model.layers])


def _streamed(gguf: GGUFFile, model: Model, isa: "ISA", settings: Settings, tuning: Tuning | None) -> "StreamedWeights":
    """Places for what does not fit in RAM, filled from the model's store, if there is one, or from its file."""
    from runtime.stored import stored_bundles  # noqa: PLC0415 - brings llvmlite and numba
    from runtime.streamed import GGUFBundles, StreamedWeights  # noqa: PLC0415

    source = stored_bundles(gguf, model, isa, stores_folder(), tuning) or GGUFBundles(gguf, model, isa, tuning)
    return StreamedWeights(source, model, isa, slots=settings.stream_slots, tuning=tuning)


def _followed(tuning: Tuning | None, isa: "ISA") -> Tuning | None:
    """The plan's choice of kernels, or none, and a warning, where it was made for others than there are."""
    from cpu_kernels.formats import can_follow  # noqa: PLC0415 - brings llvmlite and numba

    if tuning is None or can_follow(tuning, isa):
        return tuning
    log.warning("the plan's kernels were chosen for %s; the usual ones for %s are used", tuning.isa, isa.name)
    return None


def _sequential(gguf: GGUFFile, model: Model, settings: Settings, on_load: Progress | None) -> Executor:
    import torch  # noqa: PLC0415

    from runtime.executor.sequential import SequentialExecutor  # noqa: PLC0415 - brings torch
    from runtime.weights import Weights  # noqa: PLC0415

    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    weights = Weights(gguf, model, resident=settings.weights_form is WeightsForm.FLOAT32, device=device)
    weights.load(on_load)
    return SequentialExecutor(model, weights, device=device)
