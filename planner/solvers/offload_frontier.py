"""The frontier of memory and time where what is kept may wait in host memory: a few grids, as without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from evoplan.cost_model.costs import CostTable
from evoplan.planner.schedules.replay import Replay, replay
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.solvers.bounds import dividing_unit
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.frontier import Frontier, InfeasibleError
from evoplan.planner.solvers.offload import OffloadProgram

UNITS, SPAN = 4_096, 8  # steps of a grid, and its range over the last
# Where host memory is short: how many prices of a byte are tried, and the highest, in times of its copying.
PRICES, DEAREST = 8, 64.0


@dataclass
class OffloadFrontier:
    """Fastest schedules of a chain for every budget; what the first pass keeps may wait.

    Args:
        table: costs of the chain, for training, on a device apart from the host.
        host_bytes: that may be used there; where they bind, the fastest schedule of those at the prices that
            were tried, which need not be the fastest of all.
    """

    table: CostTable
    host_bytes: int
    _programs: dict[int, OffloadProgram] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.table.host_bandwidth is None:
            raise ValueError("the device has no memory apart from the host's, in which anything could wait")
        self._bandwidth = self.table.host_bandwidth
        self.plain = Frontier(self.table)
        self.output_bytes = self.plain.output_bytes
        self._spans = [min(2 * self.plain.spans[0], self.plain.most_bytes)]
        while self._spans[-1] < self.plain.most_bytes:
            self._spans.append(min(SPAN * self._spans[-1], self.plain.most_bytes))

    @property
    def most_bytes(self) -> int:
        """Memory that is of any use, outputs excluded."""
        return self.plain.most_bytes

    def budgets(self, count: int) -> list[int]:
        """Budgets from the least to the largest of any use, evenly spaced on a logarithmic scale."""
        first, last = self.least_replay.peak_bytes, self.most_bytes + self.output_bytes
        return sorted({int(budget) for budget in np.geomspace(first, last, count)} | {first, last})

    def solve(self) -> None:
        """Solve every grid now; else each is when a budget first asks for it."""
        for span in self._spans:
            self._program(span)

    def _program(self, span: int) -> OffloadProgram:
        if span not in self._programs:
            unit = dividing_unit(self.table, span, UNITS)
            program = Program(self.table, unit, -(-span // unit))
            self._programs[span] = OffloadProgram(program, self._bandwidth)
        return self._programs[span]

    def _grids(self, memory: int) -> Iterator[tuple[int, int]]:
        """Spans to ask for so much memory, and the units that it is on their grids."""
        for number, span in enumerate(self._spans):
            if number and self._spans[number - 1] >= memory:
                break
            program = self._program(span)
            units = min(memory // program.program.unit_bytes, program.size - 1)
            if units >= 0 and np.isfinite(program.times[units]):
                yield span, units

    def schedule(self, budget_bytes: int | None) -> Sequence:
        """The fastest schedule within a budget; None is unlimited, where nothing waits.

        Raises:
            InfeasibleError: nothing fits.
        """
        if budget_bytes is None:
            return self.plain.schedule(None)
        grids = list(self._grids(budget_bytes - self.output_bytes))
        schedules = [self._program(span).schedule(units) for span, units in grids]
        schedules = [schedule for schedule in schedules if self._fits(schedule)]
        if grids and not schedules:
            found = self._within_host(*grids[-1])
            schedules = [] if found is None else [found]
        if np.isfinite(self.plain.seconds(budget_bytes)):
            schedules.append(self.plain.schedule(budget_bytes))
        if not schedules:
            if self.least_replay.peak_bytes <= budget_bytes:
                return self.least
            raise InfeasibleError(budget_bytes, self.least_replay)
        replays = [replay(schedule, self.table) for schedule in schedules]
        # Of the equally fast, the one that moves less: where there is room, nothing waits.
        best = min(range(len(replays)), key=lambda n: (replays[n].seconds, replays[n].host_bytes))
        return schedules[best]

    def _within_host(self, span: int, units: int) -> Sequence | None:
        """The fastest schedule on a grid that host memory holds; None where no price was found for that."""
        schedule = self._program(span).schedule(units)
        if self._fits(schedule):
            return schedule
        # The more a byte there costs, the fewer wait.
        found, low, high = None, 1 / DEAREST, DEAREST
        for _ in range(PRICES):
            middle = (low * high) ** 0.5
            price = middle / self._bandwidth
            program = self._program(span).program
            schedule = OffloadProgram(program, self._bandwidth, price).schedule(units)
            if self._fits(schedule):
                found, high = schedule, middle
            else:
                low = middle
        return found

    def _fits(self, schedule: Sequence) -> bool:
        return replay(schedule, self.table).host_bytes <= self.host_bytes

    @cached_property
    def least(self) -> Sequence:
        """A schedule for the least budget, to the resolution of the first grid that has one."""
        for span in self._spans:
            program = self._program(span)
            feasible = np.flatnonzero(np.isfinite(program.times))
            if feasible.size:
                schedule = self._within_host(span, int(feasible[0]))
                if schedule is not None:
                    return min(schedule, self.plain.least, key=lambda one: replay(one, self.table).peak_bytes)
        return self.plain.least

    @cached_property
    def least_replay(self) -> Replay:
        """What that schedule costs."""
        return replay(self.least, self.table)


def offload_bound(table: CostTable, budget_bytes: int) -> float:
    """Seconds below which no schedule of the class can be; inf where none fits.

    The same program with every cost rounded down: what fits, fits there too. Host memory is not limited.
    """
    assert table.host_bandwidth is not None
    memory = budget_bytes - table.bytes_of(table.liveness.outputs)
    if memory < 0:
        return np.inf
    unit = dividing_unit(table, memory, UNITS)
    program = Program(table, unit, memory // unit, optimistic=True)
    return float(OffloadProgram(program, table.host_bandwidth).times[-1])
