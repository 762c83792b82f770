"""Kernels of Triton run in its interpreter here: the variable is read where a kernel is defined, so it is set first."""

import os

os.environ["TRITON_INTERPRET"] = "1"
