"""A lower bound on every schedule of the options on offer, persistent or not, in whichever order it runs.

At a moment of a training step a step of the chain is *present* if something that it made is in memory. Of
neighbouring steps a..b that were absent at some moment, all must run forward after it and before the backward
of step b, which may run b itself: nothing is there to start from. So least times obey

    owed(a, b) >= forward runs of a..b, backward of b, and for the moment just before it, over all ways to
                  be present: each present step's backward, owed(c, d) for each stretch c..d that is absent

where what is present must fit. Different stretches are different steps, and runs before and after a moment
are different runs, so nothing is counted twice. What fits is priced (Lagrange), each stretch at its best.
Nothing below a stretch counts against it: a schedule may have dropped that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from evoplan.cost_model.costs import CostTable

PRICES = 24
ROUNDING = 1e-9


MANY_STEPS = 600  # beyond, a bound that is cubic in them takes minutes


def any_order_bound(table: CostTable, budget_bytes: int) -> float:
    """Seconds below which no schedule of the options can be, persistent or not.

    Args:
        table: costs of the chain, for training.
        budget_bytes: of what is live at any moment, as the replay counts it.
    """
    room = budget_bytes - table.bytes_of(table.liveness.outputs)
    count, prices, needed = len(table.options), _prices(table), _needed(table)
    present = np.array([_present(table, step, prices, needed[step]) for step in range(count)])
    ending = np.array([_ending(table, step, prices, room) for step in range(count)])
    first = np.array([min(min(c.forward_seconds, c.discard_seconds) for c in o) for o in table.options])
    total = np.concatenate([[0.0], np.cumsum(np.where(needed, first, 0.0))])
    owed = np.zeros((count, count))

    def ways(start: int, runs: np.ndarray, present: np.ndarray) -> Iterator[np.ndarray]:
        """Least seconds and prices of all that is present or owed from `start` on, up to each step."""
        after = np.empty((count - start + 1, len(prices)))  # where the step before is present, or none is
        after[0] = 0.0
        least = after[0]
        for step in range(start, count):
            yield least
            after[step - start + 1] = least + present[step]
            again = runs[step + 1] - runs[start : step + 1] + owed[start : step + 1, step]
            absent = (after[: step - start + 1] + again[:, None]).min(axis=0)
            least = np.minimum(after[step - start + 1], absent)
        yield least

    for start in reversed(range(count)):
        for step, least in zip(range(start, count), ways(start, total, present), strict=False):
            owed[start, step] = (least + ending[step]).max()
    every = np.concatenate([[0.0], np.cumsum(first)])  # before the loss each step runs
    *_, least = ways(0, every, np.array([_present(table, step, prices, True) for step in range(count)]))
    # Sums of the same times in another order differ by less.
    return float((least - prices * (room - table.loss_bytes)).max()) * (1 - ROUNDING)


def _prices(table: CostTable) -> np.ndarray:
    """Seconds per byte, from 0 on."""
    slowest = sum(max(c.forward_seconds + c.backward_seconds for c in o) for o in table.options)
    most = max(1, sum(max(c.preserved_bytes for c in options) for options in table.options))
    return np.concatenate([[0.0], np.geomspace(1e-2, 1e5, PRICES) * slowest / most])


def _present(table: CostTable, step: int, prices: np.ndarray, needed: bool) -> np.ndarray:
    """Its runs and the price of what is there of it: its record, or something that it made.

    Args:
        needed: whether what it makes must have been made too: a run whose results nobody reads does not do.
    """
    outputs = table.liveness.outputs
    made = table.liveness.made_by(step)
    # An output is there in any case.
    size = 0 if any(v in outputs for v in made) else min(table.state_bytes[v.tensor] for v in made)
    options = table.options[step]
    first = min(min(c.forward_seconds, c.discard_seconds) for c in options)
    before = first if needed else 0.0
    record = [
        c.forward_seconds if c.ending is None else min(c.forward_seconds, before + c.ending.seconds)
        for c in options
    ]
    recorded = [
        s + c.backward_seconds + prices * c.preserved_bytes for s, c in zip(record, options, strict=True)
    ]
    again = min(c.backward_seconds + c.ending_seconds for c in options)
    least: np.ndarray = np.min([*recorded, first + again + prices * size], axis=0)
    return least


def _ending(table: CostTable, step: int, prices: np.ndarray, room: int) -> np.ndarray:
    """The runs of a step of which nothing is there, and the price of its backward's memory above the room."""
    options = table.options[step]
    runs = [
        c.backward_seconds
        + c.ending_seconds
        + prices * (min(c.backward(True).bytes, c.backward_bytes) - room)
        for c in options
    ]
    least: np.ndarray = np.min(runs, axis=0)
    return least


def _needed(table: CostTable) -> list[bool]:
    """Of each step, whether all later ones depend on it: it must run before any of them can."""
    count, graph = len(table.options), table.liveness.graph
    below = [0] * count  # a bit for each step that depends on it
    for step in reversed(range(count)):
        for version in table.liveness.made_by(step):
            for reader in graph.successors(version):
                if reader < count:
                    below[step] |= (1 << reader) | below[reader]
    return [below[step] == (1 << count) - (1 << (step + 1)) for step in range(count)]
