"""A program: the table of operations that all threads run in turn, and the values in it that change between steps.

A row is 20 int64: [0] the operation's address, [1] its work items, [2] items a chunk (0: evenly, one contiguous slice a
thread), [3] what kind of row it is, [4..19] the operation's arguments, floats bit-cast (`native.float_bits`). Row r + 1
starts when every item of row r is done. Knows nothing of threads, and of operations only their ABI:
`void op(const int64_t* args, int64_t begin, int64_t end)`.

A field may be a `Parameter`: a name whose value is set before a step. Invariant: the
table keeps its address, so that rows may be changed between runs but never during one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.python_calls import PythonCalls

ROW_FIELDS = 20
FIRST_ARGUMENT = 4
MAX_ARGUMENTS = ROW_FIELDS - FIRST_ARGUMENT
MAX_CHUNKS = 1 << 20
LINE_BYTES = 128  # two cache lines: adjacent ones are fetched together


class Operation(Protocol):
    """What has an address once it is compiled."""

    @property
    def address(self) -> int:
        """Where the machine code is."""
        ...


class Kind(IntEnum):
    """What the interpreter does with a row."""

    COMPUTE = 0
    WAIT = 1
    SIGNAL = 2
    NOTHING = 3


@dataclass(frozen=True, slots=True)
class Parameter:
    """A field whose value comes later: (value + offset) / divisor, rounded up, times factor."""

    name: str
    factor: int = 1
    offset: int = 0
    divisor: int = 1

    def of(self, value: int) -> int:
        """The field for this value of the parameter."""
        return -(-(value + self.offset) // self.divisor) * self.factor


Field = int | Parameter


def times(field: Field, factor: int) -> Field:
    """A field times a factor, also where its value comes later."""
    return field * factor if isinstance(field, int) else replace(field, factor=field.factor * factor)


def divided(field: Field, divisor: int) -> Field:
    """A field divided, rounded up; ValueError for a parameter that has a factor or a divisor already."""
    if isinstance(field, int):
        return -(-field // divisor)
    if field.divisor != 1 or field.factor != 1:
        raise ValueError(f"{field} cannot be divided")
    return replace(field, divisor=divisor)


def less(field: Field, number: int) -> Field:
    """A field less a number; ValueError for a parameter that has a factor already."""
    if isinstance(field, int):
        return field - number
    if field.factor != 1:
        raise ValueError(f"{field} cannot be lessened")
    return replace(field, offset=field.offset - number * field.divisor)


@dataclass(frozen=True, slots=True)
class Row:
    """One operation with its arguments. `keep`: objects whose memory the arguments point to."""

    name: str
    function: Operation | int
    items: Field
    args: tuple[Field, ...] = ()
    chunk: int = 0
    kind: Kind = Kind.COMPUTE
    keep: tuple[object, ...] = ()


class Program:
    """A growing table of operations. Not for use by several threads at once, except as `Pool.run` does."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._values: list[list[int]] = []
        self._names: list[str] = []
        self._keep: list[object] = []
        self._places: dict[str, list[tuple[int, int, Parameter]]] = {}
        self._table: NDArray[np.int64] | None = None
        self._flat: dict[str, tuple[NDArray[np.int64], list[Parameter] | None]] = {}
        self._unset: set[str] = set()
        self._status = aligned_int64(LINE_BYTES // 8)
        self._calls = PythonCalls()
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """The rows' names, for traces and errors."""
        return tuple(self._names)

    @property
    def parameters(self) -> frozenset[str]:
        """Every parameter's name."""
        return frozenset(self._places)

    @property
    def status_address(self) -> int:
        """Of the int64 that an operation sets to its error code (not 0); the rows after it are then skipped."""
        return self._status.ctypes.data

    @property
    def status(self) -> int:
        """The error code of the last run, 0 for none."""
        return int(self._status[0])

    def clear_status(self) -> None:
        """Forgets the error of the last run."""
        self._status[0] = 0
        self._calls.take_failure()

    def take_failure(self) -> BaseException | None:
        """What an `add_call` row raised in the last run; asked for once."""
        return self._calls.take_failure()

    def add(self, row: Row) -> int:
        """Appends a row and returns its index. ValueError for too many arguments or chunks, or negative numbers."""
        index = len(self._names)
        if len(row.args) > MAX_ARGUMENTS:
            raise ValueError(f"{row.name}: {len(row.args)} arguments, a row holds {MAX_ARGUMENTS}")
        if row.chunk < 0:
            raise ValueError(f"{row.name}: chunks of {row.chunk} items")
        address = row.function if isinstance(row.function, int) else row.function.address
        fields: list[Field] = [address, row.items, row.chunk, int(row.kind), *row.args]
        values = [0] * ROW_FIELDS
        for place, field in enumerate(fields):
            if isinstance(field, Parameter):
                self._places.setdefault(field.name, []).append((index, place, field))
                self._unset.add(field.name)
            else:
                values[place] = int(field)
        self._check_items(row.name, values[1], row.chunk)
        self._values.append(values)
        self._names.append(row.name)
        self._keep.append((row.function, row.keep))
        self._flat.clear()
        return index

    def keep(self, value: object) -> None:
        """Keeps an object whose memory rows point to as long as the program is there."""
        self._keep.append(value)

    def add_call(self, name: str, call: Callable[[], None]) -> int:
        """Appends a row that calls Python from whichever thread gets it; what it raises ends the run and is raised."""
        return self.add(Row(name, self._calls.callback(lambda _: call(), self.status_address), 1))

    def table(self) -> NDArray[np.int64]:
        """The rows, (rows, 20); ValueError while a parameter has no value yet."""
        if self._unset:
            raise ValueError(f"no value for {', '.join(sorted(self._unset))}: call Program.set")
        return self._built()

    def patch(self, row: int, argument: int, value: int) -> None:
        """Sets one argument of one row."""
        if not 0 <= argument < MAX_ARGUMENTS:
            raise ValueError(f"argument {argument}: a row holds {MAX_ARGUMENTS}")
        self._built()[row, FIRST_ARGUMENT + argument] = value

    def patch_items(self, row: int, items: int) -> None:
        """Sets the number of work items of one row."""
        table = self._built()
        self._check_items(self._names[row], items, int(table[row, 2]))
        table[row, 1] = items

    def set(self, name: str, value: int) -> None:
        """Gives a parameter its value in every row; KeyError for a name that no row uses."""
        table = self._built().reshape(-1)
        if name not in self._flat:
            places = self._places[name]
            rules = [rule for _, _, rule in places]
            where = np.array([row * ROW_FIELDS + place for row, place, _ in places], np.int64)
            self._flat[name] = where, None if all(rule == rules[0] for rule in rules) else rules
        where, different = self._flat[name]
        if different is None:
            table[where] = self._places[name][0][2].of(value)
        else:
            table[where] = [rule.of(value) for rule in different]
        self._unset.discard(name)

    def set_all(self, **values: int) -> None:
        """`set` for several parameters."""
        for name, value in values.items():
            self.set(name, value)

    def _built(self) -> NDArray[np.int64]:
        if self._table is None or len(self._table) != len(self._values):
            old = self._table
            table = aligned_int64(max(1, len(self._values)) * ROW_FIELDS).reshape(-1, ROW_FIELDS)[: len(self._values)]
            table[:] = self._values if self._values else 0
            if old is not None:
                table[: len(old)] = old
            self._table = table
        return self._table

    def _check_items(self, name: str, items: int, chunk: int) -> None:
        if items < 0 or (chunk and -(-items // chunk) >= MAX_CHUNKS):
            raise ValueError(f"{name}: {items} items in chunks of {chunk}")


def aligned_int64(count: int, alignment: int = LINE_BYTES) -> NDArray[np.int64]:
    """Zeroed int64 whose first byte lies on a multiple of `alignment`."""
    block = np.zeros(count + alignment // 8, np.int64)
    start = (-block.ctypes.data % alignment) // 8
    return block[start : start + count]
