"""The output head on the GPU. Knows nothing about how the rows it is given were computed."""

from gpu_kernels.device import Stream
from gpu_kernels.operations import Operations
from runtime.executor.hybrid.gpu_model import GpuModel
from runtime.executor.program.runner import LOGITS_TOKENS


class GpuHead:
    """Multiplies rows of `normed` and sends logits to the host's `logits`."""

    def __init__(self, gpu: GpuModel, ops: Operations, stream: Stream) -> None:
        self._gpu, self._ops, self._stream = gpu, ops, stream

    def compute(self, first: int, count: int) -> None:
        """Gives the stream the work for rows `first` and up, at most `LOGITS_TOKENS`."""
        gpu, model = self._gpu, self._gpu.model
        normed = gpu.buffers.matrix("normed", first + count, model.embedding_length)[first:]
        logits = gpu.buffers.matrix("logits", count, model.vocab_size, most=LOGITS_TOKENS)
        bias = None if model.output_bias is None else gpu.weights.vector(model.output_bias)
        scale = 1.0 if model.output_scale is None else gpu.weights.factor(model.output_scale)
        self._ops.matmul(normed, gpu.weights.matrix(model.output), logits, scale=scale, bias=bias)
        if model.logit_softcap is not None:
            self._ops.softcap(logits, cap=model.logit_softcap)
        here, there = gpu.buffers.shared("logits", count, model.vocab_size, most=LOGITS_TOKENS)
        self._stream.copy(there, here)
