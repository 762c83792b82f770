"""The executor that compiles a model's description into tables of operations and runs them on a pool of threads."""

from runtime.executor.program.executor import ProgramExecutor
from runtime.executor.program.kv import ProgramKV

__all__ = ["ProgramExecutor", "ProgramKV"]
