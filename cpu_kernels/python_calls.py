"""Python functions that the rows of a program call, from whichever thread gets there; what one raises ends the run."""

import ctypes
from collections.abc import Callable

OperationCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class PythonCalls:
    """The calls of one owner, and what the last of them that failed raised."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    def callback(self, call: Callable[[int], None], status: int) -> "PythonCall":
        """An operation that calls `call` with the number its row gives as first item.

        `status`: `Program.status_address`, set to -1 by what `call` raises.
        """
        return PythonCall(self, call, status)

    def fail(self, error: BaseException) -> None:
        """Keeps what was raised."""
        self._failure = error

    def take_failure(self) -> BaseException | None:
        """What was raised in the last run; asked for once."""
        failure, self._failure = self._failure, None
        return failure


class PythonCall:
    """An operation with an address; whoever holds a row that uses it keeps it."""

    def __init__(self, owner: PythonCalls, call: Callable[[int], None], status: int) -> None:
        def guarded(_args: int | None, number: int, _end: int) -> None:
            try:
                call(number)
            except BaseException as error:  # noqa: BLE001 - handed on by `PythonCalls.take_failure`
                owner.fail(error)
                ctypes.c_int64.from_address(status).value = -1

        self._function = OperationCallback(guarded)
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value or 0
