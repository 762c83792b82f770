"""strata runs language models across the GPU memory, RAM and flash of one machine: the names for scripts.

from strata import Engine

with Engine("model.gguf") as engine:
    for piece in engine.generate("Once upon a time", max_tokens=64):
        print(piece.text, end="")
"""

from offload.errors import (
    DeviceError,
    DoesNotFitError,
    FlashError,
    ModelFormatError,
    PlanError,
    RequestError,
    StrataError,
    UnsupportedModelError,
)
from planner.plan import Plan
from runtime.engine import Engine
from runtime.generation import Completion, Piece, Request
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.tokenizer import Tokenizer

__all__ = [
    "DEMO_DRAFT",
    "DEMO_MODEL",
    "Completion",
    "DeviceError",
    "DoesNotFitError",
    "Engine",
    "FlashError",
    "ModelFormatError",
    "Piece",
    "Plan",
    "PlanError",
    "Request",
    "RequestError",
    "SamplingParams",
    "StrataError",
    "Tokenizer",
    "UnsupportedModelError",
]
