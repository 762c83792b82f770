"""The one place that turns a plan into an executor: strata's programs, its reference loop, or llama.cpp.

Each loop brings libraries that take their time to import, so each is imported when a plan names it.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpu_kernels.tuning import Tuning
from offload.errors import PlanError
from offload.gguf import GGUFFile
from planner.plan import Plan, Settings, WeightsForm
from planner.profile import stores_folder
from planner.ways import LLAMA_CPP, PROGRAM, SEQUENTIAL
from runtime.architectures import Model, describe
from runtime.executor.base import Executor

if TYPE_CHECKING:
    from cpu_kernels.isa import ISA

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
    loops = {PROGRAM: _program, SEQUENTIAL: _sequential}
    make = loops.get(plan.settings.loop)
    if make is None:
        raise PlanError(
            f"settings.loop is {plan.settings.loop!r}; it must be one of {', '.join((*loops, LLAMA_CPP))}",
            hint="plan again with `strata plan`",
        )
    return make(gguf, describe(gguf), plan.settings, on_load)


def _program(gguf: GGUFFile, model: Model, settings: Settings, on_load: Progress | None) -> Executor:
    from cpu_kernels.isa import current as current_isa  # noqa: PLC0415
    from runtime.executor.program import ProgramExecutor  # noqa: PLC0415 - brings llvmlite and numba
    from runtime.panels import PanelWeights  # noqa: PLC0415
    from runtime.stored import stored_bundles  # noqa: PLC0415
    from runtime.streamed import GGUFBundles, StreamedWeights  # noqa: PLC0415

    isa = current_isa()
    tuning = _followed(settings.tuning, isa)
    if not settings.stream_slots:
        weights = PanelWeights(gguf, model, isa=isa, threads=settings.threads, tuning=tuning)
        weights.load(on_load)
        executor = ProgramExecutor(model, weights, threads=settings.threads)
    else:
        source = stored_bundles(gguf, model, isa, stores_folder(), tuning) or GGUFBundles(gguf, model, isa, tuning)
        streamed = StreamedWeights(source, model, isa, slots=settings.stream_slots, tuning=tuning)
        weights = PanelWeights(gguf, model, isa=isa, threads=settings.threads, streamed=streamed, tuning=tuning)
        weights.load(on_load)
        chunk = settings.prefill_chunk_tokens
        executor = ProgramExecutor(model, weights, threads=settings.threads, chunk_tokens=chunk)
    executor.warm_up()
    return executor


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
