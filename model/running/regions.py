"""Names for parts of a run: profilers print them, memory is counted by them.

A region is open while its code runs; the innermost open one is where an operator belongs.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

# The softmax weights of attention, which grow with the cube of a length.
SCORES = "attention_scores"


class _Open(threading.local):
    """Names of the open regions of a thread; backward of a GPU runs in another, and opens none."""

    def __init__(self) -> None:
        self.names: list[str] = []


_open = _Open()


class _Region:
    """An open region; a profiler that runs is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown = record_function(name) if _profiler_enabled() else None

    def __enter__(self) -> None:
        _open.names.append(self.name)
        if self.shown is not None:
            self.shown.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.names.pop()
        if self.shown is not None:
            self.shown.__exit__(kind, error, trace)


def region(name: str) -> AbstractContextManager[None]:
    """Open a region; inside compiled code, which has no parts, there is none."""
    return nullcontext() if torch.compiler.is_compiling() else _Region(name)


def open_regions() -> tuple[str, ...]:
    """Names of the open regions, the outermost first."""
    return tuple(_open.names)
