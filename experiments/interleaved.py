"""Timing several runs against each other in one process, so that they share whatever the machine is doing.

Each is run twice in a row and the second time counts: a training run repeats one step, and a process that
goes from a small step to a large one pays for memory that the system has to hand out again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

from evoplan.cost_model import measure


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each run in every round; the order turns round by round.

    Args:
        runs: by name.
        told: of each round that is through, by its number from 1.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            runs[name]()
            times[name].append(measure.seconds(runs[name], device))
        told(number + 1)
    return times
