"""What the processor's allocator does with memory that a step gives back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's names for mallopt: malloc.h


def keep_freed_memory() -> bool:
    """Have memory that the main thread frees wait for its next tensor, as torch's allocator for GPUs does.

    Left alone, glibc asks the system for every large tensor and gives it back when it is freed, so a step
    touches all its pages for the first time, again and again: docs/times.md says what that costs. In
    return the process stays as large as it ever was.

    Returns:
        Whether it does so from now on: not where the allocator is another one, or where the environment
        (MALLOC_..., GLIBC_TUNABLES) says how glibc's is to behave.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Give the system what waits, so that what it says to be free is all that a run may take."""
    if (malloc_trim := _function("malloc_trim")) is not None:
        malloc_trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
