"""How fast can a schedule be at best? Lower bounds on the dynamic program's own class of schedules.

Memory is as the program charges it, not as the replay finds it, which may be up to two states less.
Two relaxations, of which the better one counts:

- *Rounding down*: the same program with every cost rounded down to its grid. Whatever fits fits there too.
  The grid's step divides the state's sizes, or nearly so: they are rounded once for each checkpoint.
- *A price on memory*: only what the first pass keeps must fit, and it may be bought at any price a second
  per byte. For each price the cheapest chain is a shortest path; the best price gives the bound
  (Lagrange). Exact bytes, no grid: tight where a budget holds many parts, loose where one step fills it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evoplan.cost_model.costs import CostTable
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.grid import FIRST, GridCosts, Times
from evoplan.planner.solvers.segments import SegmentCosts

PRICES = 160
MOST_UNITS = 32_768
CANDIDATES = 512  # grid steps that are looked at
WASTE = 0.02  # of the state: so little is not worth a finer grid
FINER = 3
# Where so few states fit, times change fast with memory, and so many times as many grid steps are worth it.
FEW_STATES, FINER_THERE = 24, 16
CLOSER = (MOST_UNITS, 4 * MOST_UNITS)  # steps of a budget's own grids, where a bound is to be closer


class LowerBound:
    """Seconds below which no persistent schedule can be, by budget.

    Args:
        table: costs of the chain, for training.
        max_depth: how deep checkpoints may nest; None for any depth.
        spans: memory of the grids, ascending; a budget uses the first that holds it, or one of its own.
        units: steps of a grid.
    """

    def __init__(
        self, table: CostTable, max_depth: int | None = None, spans: Sequence[int] = (), units: int = 8192
    ) -> None:
        self.table, self.max_depth, self.units = table, max_depth, units
        self._spans = tuple(spans)
        self._output_bytes = table.bytes_of(table.liveness.outputs)
        self._programs: dict[int, tuple[int, Times]] = {}
        self._prices, self._priced = priced(table, max_depth)

    def seconds(self, budget_bytes: int, enough: float = 0.0) -> float:
        """No schedule whose peak, as the program charges it, fits is faster; inf if none fits.

        Args:
            enough: while the bound is less, finer grids of the budget's own are solved too.
        """
        memory = budget_bytes - self._output_bytes
        if memory < 0:
            return np.inf
        kept = memory - self.table.loss_bytes
        found = max(float(np.max(self._priced - self._prices * kept)), self._on_grid(memory))
        for units in CLOSER:
            if found >= enough:
                break
            found = max(found, float(self._solved(memory, units)[1][-1]))
        return found

    def _on_grid(self, memory: int) -> float:
        span = next((span for span in self._spans if span >= memory), memory)
        if span not in self._programs:
            few = span < FEW_STATES * sum(self.table.state_bytes.values())
            units = self.units * FINER_THERE if few else self.units
            self._programs[span] = self._solved(span, min(units, MOST_UNITS))
        unit, times = self._programs[span]
        return float(times[memory // unit])

    def _solved(self, span: int, units: int) -> tuple[int, Times]:
        """A grid's step, and least times by budget in such steps."""
        unit = dividing_unit(self.table, span, units, FINER)
        program = Program(self.table, unit, span // unit, self.max_depth, optimistic=True)
        return unit, program.times.copy()


def priced(table: CostTable, max_depth: int | None) -> tuple[Times, Times]:
    """Prices in seconds per byte, and the least of seconds + price * bytes kept at each."""
    costs = GridCosts(table, 1, 1)
    groups = table.groups
    rows = [costs.recorded(step, FIRST, False) for step in range(len(table.options))]
    slowest = sum(max(row.seconds for row in options) for options in rows)
    most = max(1, sum(max(row.preserved for row in options) for options in rows))
    prices = np.concatenate([[0.0], np.geomspace(1e-4, 1e4, PRICES) * slowest / most])

    # A checkpoint takes a discarding pass and a redo. Its last step runs forward on the redo as far as its
    # backward needs it; so does the last step of a checkpoint nested there, for one pass more.
    forward = [min(cost.discard_seconds for cost in options) for options in table.options]
    last = [min(c.backward_seconds + c.ending_seconds for c in options) for options in table.options]
    both = [min(c.forward_seconds + c.backward_seconds for c in options) for options in table.options]
    again = [min(alone, once + end) for alone, once, end in zip(both, forward, last, strict=True)]
    twice = np.concatenate([[0.0], np.cumsum(np.add(forward, again))])

    def checkpoint(start: int, stop: int, kept: float) -> Times:
        seconds: float = twice[stop] - twice[start] - again[stop - 1] + last[stop - 1]
        return seconds + prices * kept

    over_groups = SegmentCosts(costs)
    best = [np.full(len(prices), np.inf) for _ in range(len(rows) + 1)]
    best[-1] = np.zeros(len(prices))
    ends = [group.stop for group in groups]
    for number in reversed(range(len(groups))):
        group = groups[number]
        for step in reversed(group):
            found = [best[step + 1] + row.seconds + prices * row.preserved for row in rows[step]]
            if max_depth != 0:
                for stop in range(step + 1, group.stop + 1):
                    kept = costs.exit(range(step, stop), FIRST)
                    found.append(best[stop] + checkpoint(step, stop, kept))
            best[step] = np.min(found, axis=0)
        if max_depth != 0:
            exits = over_groups.kept(number, len(groups), FIRST)
            for stop, exit_bytes in zip(ends[number + 1 :], exits[1:], strict=True):
                np.minimum(
                    best[group.start], best[stop] + checkpoint(group.start, stop, exit_bytes),
                    out=best[group.start],
                )  # fmt: skip
    return prices, best[0]


def dividing_unit(table: CostTable, span_bytes: int, units: int, finer: int = 1) -> int:
    """A grid step of span / units, about, by which the sizes of the state are nearly divided.

    Every checkpoint keeps state, so that rounding it down is what loses most.

    Args:
        finer: the grid may have so many times more steps where that divides the state better.
    """
    if span_bytes <= units:
        return 1
    smallest = max(1, -(-span_bytes // (finer * units)))
    largest = 2 * finer * smallest
    sizes = np.array(list(table.state_bytes.values()))
    parts = (size // count for size in map(int, sizes) for count in range(1, size // smallest + 1))
    candidates = {unit for unit in parts if smallest <= unit <= largest}
    candidates |= set(np.linspace(smallest, largest, CANDIDATES).astype(np.int64).tolist())
    chosen = np.array(sorted(candidates))
    waste = (sizes[:, None] % chosen / np.maximum(1, sizes[:, None])).sum(axis=0)
    return int(chosen[waste <= waste.min() + WASTE][-1])
