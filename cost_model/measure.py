"""What a run really allocates and how long it takes, from the device's own allocator and clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Usage(NamedTuple):
    """Bytes above what was live before a run: the most during it, and what is left of it."""

    peak: int
    left: int


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes live during `run()` above what is live before it."""
    return usage(run, device).peak


def usage(run: Callable[[], object], device: str = "cpu") -> Usage:
    """Bytes that `run()` takes, and keeps.

    CPU: the allocator's own events, as torch.profiler records them; CUDA: max_memory_allocated.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return Usage(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return _usage_of(profiler)


def _usage_of(profiler: profile) -> Usage:
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None  # it has run
    # The sum of the events' sizes: their running total drifts from one profile to the next.
    events = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event[0])
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return Usage(peak, live)


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of `run()`, the device synchronised before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
