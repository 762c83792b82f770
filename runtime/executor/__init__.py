"""Executors: the plain sequential one is the reference for all others."""

from runtime.executor.base import Executor, LogitsWanted, Step
from runtime.executor.sequential import SequentialExecutor

__all__ = ["Executor", "LogitsWanted", "SequentialExecutor", "Step"]
