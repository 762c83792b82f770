"""Programs that were made, so that few are made twice, each with the values that its parameters have.

Knows nothing about what programs do.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable

from cpu_kernels.program import Program

MAX_PROGRAMS = 64
MAX_PLANNED_ROWS = 1 << 14  # of those that are made for plans: many rows each, of use while the plan stays the same


class Settable:
    """A program whose parameters are set only when they change."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._values: dict[str, int] = {}
        self._known = program.parameters

    def has(self, name: str) -> bool:
        """Whether the program has a parameter of that name."""
        return name in self._known

    def set(self, name: str, value: int) -> None:
        """Sets a parameter if the program has it."""
        if self._values.get(name) != value and name in self._known:
            self.program.set(name, value)
            self._values[name] = value


class Programs:
    """Those that were used last, by what they are made for."""

    def __init__(self) -> None:
        self._lasting: OrderedDict[Hashable, Settable] = OrderedDict()
        self._planned: OrderedDict[Hashable, Settable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lasting) + len(self._planned)

    def get(self, key: Hashable, plan: Hashable | None, new: Callable[[], Program]) -> Settable:
        """The program for a key, and for a plan that soon changes if there is one; `new` makes it."""
        programs = self._lasting if plan is None else self._planned
        if (key, plan) not in programs:
            programs[key, plan] = Settable(new())
            self._forget_some()
        programs.move_to_end((key, plan))
        return programs[key, plan]

    def _forget_some(self) -> None:
        if len(self._lasting) > MAX_PROGRAMS:
            self._lasting.popitem(last=False)
        rows = sum(len(planned.program) for planned in self._planned.values())
        while rows > MAX_PLANNED_ROWS and len(self._planned) > 1:
            rows -= len(self._planned.popitem(last=False)[1].program)

    def clear(self) -> None:
        """Forgets all."""
        self._lasting.clear()
        self._planned.clear()
