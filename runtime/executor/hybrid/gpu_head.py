"""The output head on the GPU. Knows nothing about how the rows it is given were computed."""

from gpu_kernels.device import Stream
from gpu_kernels.operations import Operations
from runtime.executor.hybrid.gpu_model import GpuModel
from runtime.executor.hybrid.recording import Recording
from runtime.executor.program.runner import LOGITS_TOKENS

MAX_RECORDINGS = 16


class GpuHead:
    """Multiplies rows of `normed` and sends logits to the host's `logits`."""

    def __init__(self, gpu: GpuModel, stream: Stream) -> None:
        self._gpu, self._stream = gpu, stream
        self._recordings: dict[tuple[int, int], Recording] = {}

    def compute(self, first: int, count: int) -> None:
        """Gives the stream the work for rows `first` and up, at most `LOGITS_TOKENS`."""
        place = (first, count)
        if place not in self._recordings:
            if len(self._recordings) == MAX_RECORDINGS:
                self._recordings.clear()
            self._recordings[place] = self._recorded(first, count)
        self._recordings[place].replay()

    def forget(self) -> None:
        """The GPU's buffers are others from now on."""
        self._recordings.clear()

    def _recorded(self, first: int, count: int) -> Recording:
        gpu, model, recording = self._gpu, self._gpu.model, Recording(self._stream)
        ops = Operations(recording, gpu.kernels)
        normed = gpu.buffers.matrix("normed", first + count, model.embedding_length)[first:]
        logits = gpu.buffers.matrix("logits", count, model.vocab_size, most=LOGITS_TOKENS)
        bias = None if model.output_bias is None else gpu.weights.vector(model.output_bias)
        scale = 1.0 if model.output_scale is None else gpu.weights.factor(model.output_scale)
        ops.matmul(normed, gpu.weights.matrix(model.output), logits, scale=scale, bias=bias)
        if model.logit_softcap is not None:
            ops.softcap(logits, cap=model.logit_softcap)
        here, there = gpu.buffers.shared("logits", count, model.vocab_size, most=LOGITS_TOKENS)
        recording.copy(there, here)
        return recording
