"""What a GPU is to the rest: memory, streams of launched work, events between them, and calls of host functions.

Implemented by `CudaDevice` and `SimulatedDevice`. Knows nothing of models, files or plans. Invariants: the work of one
stream happens in the order in which it was given; nothing given to a stream waits for the host, except where pinned
memory could not be had. Tensors on a device are torch tensors; what a stream still uses must not be freed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation moves through the GPU's memory and computes; a multiply-add counts as two flops."""

    num_bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)


CostOf = Cost | Callable[[], Cost]  # what is only known then is asked for when the work's turn comes


@dataclass(frozen=True, slots=True)
class Launch:
    """What `Stream.launch` is given."""

    call: Callable[[], None]
    cost: CostOf
    name: str = ""


@dataclass(frozen=True, slots=True)
class Copy:
    """What `Stream.copy` is given."""

    target: "torch.Tensor"
    source: "torch.Tensor"


@dataclass(frozen=True, slots=True)
class CallHost:
    """What `Stream.call_host` is given."""

    address: int
    argument: int


Work = Launch | Copy | CallHost


class Event(Protocol):
    """A point in a stream's work."""

    @property
    def is_done(self) -> bool:
        """Whether the work before it has been done; never waits."""
        ...

    def synchronize(self) -> None:
        """Returns when the work before it has been done; raises what of it failed, if its stream has not told yet."""
        ...


class Stream(Protocol):
    """Work that happens in the order in which it was given, beside the host and the other streams."""

    @property
    def name(self) -> str:
        """As it was asked for."""
        ...

    def launch(self, call: Callable[[], None], cost: CostOf, name: str = "") -> None:
        """Does the torch operations and kernels of `call` in order; `cost` is what they need, `name` tells of them.

        A cost that is a function is asked for when the call's turn comes, and only by a simulated GPU.

        Where the GPU is simulated the call happens later, in the stream's thread: what it raises comes out of
        `synchronize`, and until then the stream's launches and copies are left out, its host calls and events not.
        Elsewhere it is called at once and may raise here.
        """
        ...

    def copy(self, target: "torch.Tensor", source: "torch.Tensor") -> None:
        """Copies between tensors of one shape and type; ValueError where they differ.

        `source` must stay as it is until then. Does not make the host wait where the host's side is pinned.
        """
        ...

    def record(self) -> Event:
        """The point after everything given so far."""
        ...

    def wait(self, event: Event) -> None:
        """What is given from now on happens after the event of a stream of the same device."""
        ...

    def call_host(self, address: int, argument: int) -> None:
        """Calls the C function `void f(void *)` at the address, in order: what is given after waits till it returns.

        It may wait for other threads of the host, but not for host functions of other streams, which may have to wait
        until it returns; it calls nothing of the GPU's and does not take Python's lock.
        """
        ...

    def prepare(self, work: Sequence[Work]) -> Callable[[], None]:
        """What gives all of it to the stream, in order, every time that it is called: for work that is repeated."""
        ...

    @property
    def can_capture(self) -> bool:
        """Whether work that is repeated can be made one piece, which costs the host less."""
        ...

    def capture(self, give: Callable[[], None]) -> Callable[[], None]:
        """What gives all that `give` gives the stream, as one piece, every time that it is called; nothing is done now.

        `give` must have been called before. NotImplementedError where the stream cannot; RuntimeError where it fails.
        """
        ...

    def synchronize(self) -> None:
        """Returns when all has been done; raises, once, the first error of what was launched."""
        ...


class GpuDevice(Protocol):
    """A GPU with its memory and streams."""

    @property
    def name(self) -> str:
        """What to show; says "simulated" where it is."""
        ...

    @property
    def is_simulated(self) -> bool:
        """Whether its times are modelled and its memory is the host's."""
        ...

    @property
    def torch_device(self) -> "torch.device":
        """Where its tensors lie; the CPU for a simulated one."""
        ...

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Of NVIDIA's GPUs."""
        ...

    @property
    def host_cpus(self) -> frozenset[int] | None:
        """The CPUs on which the host's part of the work is beside the device's; None: on all."""
        ...

    @property
    def total_bytes(self) -> int:
        """Its memory, or what may be used of it."""
        ...

    @property
    def free_bytes(self) -> int:
        """What `empty` can still give, in sum."""
        ...

    def empty(self, shape: Sequence[int], dtype: "torch.dtype") -> "torch.Tensor":
        """Memory with arbitrary contents; torch.OutOfMemoryError where there is not enough.

        Counted until the last tensor that shares it is gone.
        """
        ...

    def free(self, tensor: "torch.Tensor") -> None:
        """Empties a tensor, so that its memory is free unless other tensors share it."""
        ...

    def pinned(self, shape: Sequence[int], dtype: "torch.dtype") -> "torch.Tensor":
        """Zeroed host memory that copies need not wait for; ordinary memory and one warning where pinning fails."""
        ...

    def stream(self, name: str) -> Stream:
        """A new stream."""
        ...

    def close(self) -> None:
        """Leaves out what has not begun and waits for the rest. Twice is harmless; nothing may be given afterwards."""
        ...


def check_copy(target: "torch.Tensor", source: "torch.Tensor") -> None:
    """ValueError unless a stream can copy one to the other."""
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f"{source.dtype} {tuple(source.shape)} cannot be copied to {target.dtype} {tuple(target.shape)}"
        )
