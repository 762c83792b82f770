"""Executors turn tokens into logits; `runtime.backend` makes the one that a plan names."""

from runtime.executor.base import Executor, KVHandle, LogitsWanted, Step

__all__ = ["Executor", "KVHandle", "LogitsWanted", "Step"]
