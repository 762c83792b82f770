"""A draft head as a program of the CPU's kernels: one hidden state and one token in, the next hidden state out.

From the hidden state F of a token (behind the output norm) and the embedding e of the next, Dovetail's gate (Dynamic
Gating Fusion) makes h1 = F W1, h2 = SiLU(RMSNorm(e) W2), z = sigmoid([h1; h2] Wz), h = z h1 + (1 - z) h2; a residual
feed-forward part follows, h + SiLU(RMSNorm(h) Wu) Wd. Weights stay in half precision. Knows nothing of logits or text.
"""

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.activations import quantize_row
from cpu_kernels.elementwise import add_row, gate_row, rms_norm_row
from cpu_kernels.formats import panel_format
from cpu_kernels.isa import ISA, current
from cpu_kernels.matmul import matmul_row
from cpu_kernels.matrix import Matrix
from cpu_kernels.pack import pack
from cpu_kernels.program import Program
from cpu_kernels.quant_types import quant_type
from runtime.executor.program.workspace import Workspace
from runtime.speculative.head_weights import HalfMatrix, HeadWeights

EPSILON = 1e-6
ONE = 1  # token in a run
F16 = quant_type("F16")


class HeadProgram:
    """The program for `weights`, of which it keeps packed copies; one run at a time."""

    def __init__(self, weights: HeadWeights, *, isa: ISA | None = None) -> None:
        self._isa = isa or current()
        self._embedding = weights.embedding
        self._workspace = Workspace()
        self._feature = self._workspace.array("feature", ONE, weights.width)
        self._token = self._workspace.array("embedding", ONE, weights.width)
        self._out = self._workspace.array("out", ONE, weights.width)
        self.program = Program()
        self._write(weights)

    def put(self, feature: NDArray[np.float32], token_id: int) -> None:
        """What the next run goes on from: the hidden state (d,) of a token, and the token behind it."""
        self._feature[0] = feature
        self._token[0] = self._embedding[token_id]

    def feature(self) -> NDArray[np.float32]:
        """The hidden state (d,) that the last run foretold: a copy."""
        found: NDArray[np.float32] = self._out[0].copy()
        return found

    def _write(self, weights: HeadWeights) -> None:
        width, inner = weights.width, weights.inner
        feature, token, fused = (self._matrix(name, width) for name in ("feature", "embedding", "out"))
        both, gate, mixed = self._matrix("both", 2 * width), self._matrix("gate", width), self._matrix("mixed", width)
        first, second = both.slice(0, width), both.slice(width, width)
        up, ones = self._matrix("up", inner), self._filled("ones", max(width, inner), 1.0)
        minus = self._filled("minus", width, -1.0)
        self._multiply(feature, weights.w1, first)
        self._norm(token, ones.address)
        self._multiply(token, weights.w2, gate)
        self._gate(second, gate, ones.slice(0, width), "silu")
        self._gate(mixed, gate, minus, "silu")
        self._multiply(both, weights.wz, gate)
        self._add(mixed, mixed, first)  # h1 - h2
        self._gate(mixed, gate, mixed, "sigmoid")
        self._add(fused, mixed, second)
        self._add(mixed, mixed, second)
        self._norm(mixed, ones.address)
        self._multiply(mixed, weights.wu, up)
        self._gate(up, up, ones.slice(0, inner), "silu")
        self._multiply(up, weights.wd, fused, adds=True)

    def _matrix(self, name: str, columns: int) -> Matrix:
        return self._workspace.matrix(name, ONE, columns)

    def _filled(self, name: str, columns: int, value: float) -> Matrix:
        self._workspace.array(name, ONE, columns)[...] = value
        return self._matrix(name, columns)

    def _multiply(self, source: Matrix, weights: HalfMatrix, out: Matrix, *, adds: bool = False) -> None:
        """out = source times the weights (inputs, outputs); `adds`: to what is in `out`."""
        columns, rows = weights.shape
        form = panel_format(F16, self._isa)
        panels = pack(np.ascontiguousarray(weights.T).view(np.uint8).reshape(-1), F16, rows, columns, self._isa)
        buffer = form.activations(columns, ONE)
        self.program.add(quantize_row(source.address, source.stride_bytes, ONE, buffer))
        place = (form, int(panels.ctypes.data), rows, columns, buffer, out.address, out.stride_bytes, ONE)
        self.program.add(matmul_row(*place, adds=adds, keep=(panels, self._workspace)))

    def _norm(self, x: Matrix, weight: int) -> None:
        self.program.add(rms_norm_row(x, x, weight, ONE, eps=EPSILON, isa=self._isa))

    def _gate(self, out: Matrix, gate: Matrix, up: Matrix, activation: str) -> None:
        self.program.add(gate_row(out, gate, up, ONE, activation=activation, isa=self._isa))

    def _add(self, out: Matrix, x: Matrix, y: Matrix) -> None:
        self.program.add(add_row(out, x, y, ONE, isa=self._isa))
