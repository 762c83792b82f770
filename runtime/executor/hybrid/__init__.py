"""The executor that runs parts of a model on a GPU and the others on the CPU, beside each other."""

from runtime.executor.hybrid.executor import HybridExecutor
from runtime.executor.hybrid.kv import HybridKV
from runtime.executor.hybrid.placement import HybridPlacement

__all__ = ["HybridExecutor", "HybridKV", "HybridPlacement"]
