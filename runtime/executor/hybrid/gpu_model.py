"""What lies on the GPU between steps, as one value. Knows nothing about what is done with it."""

from dataclasses import dataclass

from gpu_kernels.kernels import Kernels
from runtime.architectures.base import Model
from runtime.executor.hybrid.angles import GpuAngles
from runtime.executor.hybrid.buffers import GpuBuffers
from runtime.executor.hybrid.kv_pool import KVPool
from runtime.executor.hybrid.weights import GpuWeights


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A model's weights, activations, keys and values, angles, and what computes with them."""

    model: Model
    weights: GpuWeights
    buffers: GpuBuffers
    pool: KVPool
    angles: GpuAngles
    kernels: Kernels
