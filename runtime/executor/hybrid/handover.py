"""Where a step's program and the GPU's stream wait for each other, without Python in between.

Each side counts what it gave the other: the n-th wait of one is for the n-th signal of the other. Knows nothing about
what is handed over. Invariant: `reset` and `fail` leave nobody waiting for a step that will not come.
"""

from cpu_kernels.program import Program
from cpu_kernels.waiting import Counter, HostCall
from runtime.executor.hybrid.recording import Recording

FAILED = 102  # the code that a program ends with where the other side failed


class Handover:
    """The counters of one executor; one step uses them at a time."""

    def __init__(self) -> None:
        self.begun = Counter()  # raised by the program's first row
        self._to_gpu, self._to_cpu, self._brought = Counter(), Counter(), Counter()
        self._tell_cpu = self._to_cpu.raise_call()
        self.tell_brought = self._brought.raise_call()  # called once for every layer that may have had experts brought
        self._waits: list[HostCall] = []
        self._waits_brought: list[HostCall] = []

    def reset(self) -> None:
        """Before a step, when nothing of another one is going on."""
        for counter in (self.begun, self._to_gpu, self._to_cpu, self._brought):
            counter.reset()

    def fail(self) -> None:
        """Ends every wait of the step, on both sides."""
        for counter in (self.begun, self._to_gpu, self._to_cpu, self._brought):
            counter.fail(FAILED)

    def host_side(self, program: Program) -> "HostSide":
        """The waits and signals of a new program, whose first row tells that it has begun."""
        program.add(self.begun.signal_row(name="begun"))
        return HostSide(program, self._to_gpu, self._to_cpu)

    def gpu_side(self, stream: Recording) -> "GpuSide":
        """The waits and signals of a new recording."""
        return GpuSide(stream, self._tell_cpu, self)

    def wait_for_cpu(self, signals: int) -> HostCall:
        """The call that returns when the program has given so many signals."""
        return _wait(self._to_gpu, self._waits, signals)

    def wait_for_brought(self, layers: int) -> HostCall:
        """The call that returns when what so many layers had brought is there."""
        return _wait(self._brought, self._waits_brought, layers)


class HostSide:
    """Appends rows to a program."""

    def __init__(self, program: Program, to_gpu: Counter, to_cpu: Counter) -> None:
        self._program, self._to_gpu, self._to_cpu = program, to_gpu, to_cpu
        self._waits = 0

    def signal(self) -> None:
        """What the rows before have written may be read by the GPU."""
        self._program.add(self._to_gpu.signal_row(name="to_gpu"))

    def wait(self) -> None:
        """The rows after may read what the GPU has copied to the host."""
        self._waits += 1
        self._program.add(self._to_cpu.wait_row(self._waits, name="from_gpu"))


class GpuSide:
    """Adds calls to a recording."""

    def __init__(self, stream: Recording, tell_cpu: HostCall, handover: Handover) -> None:
        self._stream, self._tell_cpu, self._handover = stream, tell_cpu, handover
        self._waits = self._waits_brought = 0

    def signal(self) -> None:
        """What was copied to the host may be read by the program."""
        self._stream.call_host(self._tell_cpu.address, self._tell_cpu.argument)

    def wait(self) -> None:
        """What comes after may read what the program has written."""
        self._waits += 1
        call = self._handover.wait_for_cpu(self._waits)
        self._stream.call_host(call.address, call.argument)

    def wait_brought(self) -> None:
        """What comes after may use the experts that the layer had brought."""
        self._waits_brought += 1
        call = self._handover.wait_for_brought(self._waits_brought)
        self._stream.call_host(call.address, call.argument)


def _wait(counter: Counter, calls: list[HostCall], target: int) -> HostCall:
    """The call that waits for a value; calls are kept, since streams refer to them."""
    while len(calls) < target:
        calls.append(counter.wait_call(len(calls) + 1))
    return calls[target - 1]
