"""Calls of host functions in a stream's order, through the driver that torch uses: CUDA's or ROCm's.

torch has no call for it. Only the driver's library is needed, which every machine with such a GPU has; a stream's
handle is the same for it and for the runtime. Knows nothing about what the functions do. They run one at a time, on a
thread of the driver, so that one that waits holds up those of all other streams.
Sources: CUDA Driver API, cuLaunchHostFunc; HIP Runtime API, hipLaunchHostFunc.
"""

import ctypes
import sys
from typing import Protocol

_NVIDIA = ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1", "cuLaunchHostFunc")
_AMD = ("amdhip64.dll" if sys.platform == "win32" else "libamdhip64.so", "hipLaunchHostFunc")


class HostLauncher(Protocol):
    """Puts host functions into streams."""

    def __call__(self, stream: int, address: int, argument: int) -> None:
        """Calls `void f(void *)` at the address after what the stream with this handle was given so far.

        RuntimeError where the driver refuses.
        """
        ...


def host_launcher(*, is_hip: bool = False) -> HostLauncher:
    """Of this machine's driver; NotImplementedError where it cannot be had."""
    library_name, function_name = _AMD if is_hip else _NVIDIA
    try:
        function = getattr(ctypes.CDLL(library_name), function_name)
    except (OSError, AttributeError) as error:
        needed = f"{function_name} of {library_name}"
        raise NotImplementedError(f"host functions on a stream need {needed}: {error}") from error
    function.restype = ctypes.c_int
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

    def launch(stream: int, address: int, argument: int) -> None:
        code = function(stream, address, argument)
        if code != 0:
            raise RuntimeError(f"{function_name} failed with code {code}")

    return launch
