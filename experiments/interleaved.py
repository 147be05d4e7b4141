"""Timing several runs against each other in one process, so that they share whatever the machine is doing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

from cost_model import measure


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each run in every round, after one that is not counted; the order turns round by round.

    Args:
        runs: by name.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            seconds = measure.seconds(runs[name], device)
            if number:
                times[name].append(seconds)
    return times
