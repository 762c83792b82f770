"""Which runtime computes the logits: strata's own loop, or llama.cpp for what it does not know yet.

The one place that turns a plan into an executor; nothing is chosen silently.
"""

from collections.abc import Callable

import torch

from offload.gguf import GGUFFile
from planner.plan import Plan, WeightsForm
from planner.solve import LLAMA_CPP
from runtime.architectures import describe
from runtime.executor.base import Executor
from runtime.executor.llama_cpp import LlamaCppExecutor
from runtime.executor.sequential import SequentialExecutor
from runtime.weights import Weights


def make_executor(gguf: GGUFFile, plan: Plan, *, on_load: Callable[[int, int], None] | None) -> Executor:
    """Load the weights where the plan puts them, for the loop it names.

    Raises `UnsupportedModelError` for an architecture or quant type that the loop does not know.
    """
    settings = plan.settings
    if settings.loop == LLAMA_CPP:
        return LlamaCppExecutor(gguf, plan)
    model = describe(gguf)
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    weights = Weights(gguf, model, resident=settings.weights_form is WeightsForm.FLOAT32, device=device)
    weights.load(on_load)
    return SequentialExecutor(model, weights, device=device)
