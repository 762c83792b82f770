"""The one place that turns a plan into an executor: strata's programs, its reference loop, or llama.cpp.

Each loop brings libraries that take their time to import, so each is imported when a plan names it.
"""

from collections.abc import Callable

from offload.gguf import GGUFFile
from planner.plan import Plan, Settings, WeightsForm
from planner.solve import LLAMA_CPP, SEQUENTIAL
from runtime.architectures import Model, describe
from runtime.executor.base import Executor

Progress = Callable[[int, int], None]


def make_executor(gguf: GGUFFile, plan: Plan, *, on_load: Progress | None) -> Executor:
    """Load the weights where the plan puts them, for the loop it names.

    Raises `UnsupportedModelError` for an architecture or quant type that the loop does not know.
    """
    if plan.settings.loop == LLAMA_CPP:
        from runtime.executor.llama_cpp import LlamaCppExecutor  # noqa: PLC0415

        return LlamaCppExecutor(gguf, plan)
    make = _sequential if plan.settings.loop == SEQUENTIAL else _program
    return make(gguf, describe(gguf), plan.settings, on_load)


def _program(gguf: GGUFFile, model: Model, settings: Settings, on_load: Progress | None) -> Executor:
    from runtime.executor.program import ProgramExecutor  # noqa: PLC0415 - brings llvmlite and numba
    from runtime.panels import PanelWeights  # noqa: PLC0415

    weights = PanelWeights(gguf, model, threads=settings.threads)
    weights.load(on_load)
    executor = ProgramExecutor(model, weights, threads=settings.threads)
    executor.warm_up()
    return executor


def _sequential(gguf: GGUFFile, model: Model, settings: Settings, on_load: Progress | None) -> Executor:
    import torch  # noqa: PLC0415

    from runtime.executor.sequential import SequentialExecutor  # noqa: PLC0415 - brings torch
    from runtime.weights import Weights  # noqa: PLC0415

    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    weights = Weights(gguf, model, resident=settings.weights_form is WeightsForm.FLOAT32, device=device)
    weights.load(on_load)
    return SequentialExecutor(model, weights, device=device)
