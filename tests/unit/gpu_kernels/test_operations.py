"""Operations launch what they are asked to, in order, at the cost that their shapes have."""

from collections.abc import Callable

import torch

from gpu_kernels.blocks import KVBlocks, KVRows, Lanes, Rotation
from gpu_kernels.device import Cost, Event
from gpu_kernels.matrix import arrange
from gpu_kernels.operations import Operations, attention_cost
from gpu_kernels.torch_kernels import TorchKernels
from tests.support.gpu_matrices import assert_close, normal, raw_rows, weights_of


class Recorder:
    """A stream that does everything at once and remembers costs."""

    def __init__(self) -> None:
        self.name = "recorder"
        self.launched: list[tuple[str, Cost]] = []

    def launch(self, call: Callable[[], None], cost: Cost | Callable[[], Cost], name: str = "") -> None:
        self.launched.append((name, cost if isinstance(cost, Cost) else cost()))
        call()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        raise NotImplementedError

    def record(self) -> Event:
        raise NotImplementedError

    def wait(self, event: Event) -> None:
        raise NotImplementedError

    def call_host(self, address: int, argument: int) -> None:
        raise NotImplementedError

    def synchronize(self) -> None:
        raise NotImplementedError


def test_products_cost_their_weights_and_activations() -> None:
    stream, raw = Recorder(), raw_rows("Q8_0", 2, 6, 64)
    operations, stack = Operations(stream, TorchKernels()), arrange(torch.from_numpy(raw), "Q8_0")
    x, out = normal(1, 3, 64), torch.empty((3, 6))
    operations.matmul(x, stack.slot(0), out)
    assert_close(out, x @ weights_of(raw, "Q8_0")[0].T, 1e-6)
    segments = torch.tensor([[1, 0, 3, 1]], dtype=torch.int32)
    operations.expert_matmul(x, stack, segments, out)
    assert_close(out, x @ weights_of(raw, "Q8_0")[1].T, 1e-6)
    cost = Cost(6 * 68 + 4 * 3 * 70, 2 * 3 * 6 * 64)
    assert stream.launched == [("matmul", cost), ("expert_matmul", cost)]


def test_every_other_operation_is_launched() -> None:
    stream = Recorder()
    operations = Operations(stream, TorchKernels())
    x, y, out, vector = normal(2, 2, 8), normal(3, 2, 8), torch.empty((2, 8)), normal(4, 8)
    ids, shares = torch.empty((2, 1), dtype=torch.int32), torch.empty((2, 1))
    index, count = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    cache = KVBlocks(*[KVRows(torch.zeros((2, 4, 1, 8)).half(), 8)] * 2)
    lanes = Lanes(torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32))
    operations.rms_norm(x, vector, out, eps=1e-6)
    operations.add_norm(x, y, vector, out, eps=1e-6)
    operations.add(x, y)
    operations.add_gated(x, y, x[:, :1])
    operations.gate(x, y, out, activation="silu")
    operations.softcap(x, cap=5.0)
    operations.scale_bias(x, scale=2.0, bias=vector)
    operations.gather_rows(x, index, out)
    operations.scatter_add_weighted(x, y, vector[:2], index, count)
    operations.heads(x, y, out, index, Rotation(torch.ones((2, 4)), torch.zeros((2, 4)), True), cache, lanes)
    marks = torch.empty((2, 2))
    operations.attention(x, cache, lanes, out, context=3, scale=1.0, marks=marks)
    operations.join_parts(out, marks, torch.zeros((2, 10)))
    operations.route(x, ids, shares, norm=True)
    operations.topk(x, shares, ids)
    assert [name for name, _ in stream.launched] == [
        *("rms_norm", "add_norm", "add", "add_gated", "gate", "softcap", "scale_bias", "gather_rows"),
        *("scatter_add_weighted", "heads", "attention", "join_parts", "route", "topk"),
    ]
    assert stream.launched[0][1] == Cost(2 * 64, 32)


def test_attention_costs_what_it_reads() -> None:
    cache = KVBlocks(*[KVRows(torch.empty((1, 4, 2, 8)).half(), 8)] * 2)
    one = attention_cost(torch.empty((1, 32)), cache, 1, 1000, None)
    assert one == Cost(1000 * 64 + 128 + 128, 2 * 4 * 1000 * 16)
    assert attention_cost(torch.empty((1, 32)), cache, 1, 1000, 100).flops == 2 * 4 * 100 * 16
    prompt = attention_cost(torch.empty((11, 32)), cache, 1, 11, None)
    assert prompt.flops == 2 * 11 * 4 * 6 * 16  # a token sees 6 on the average
