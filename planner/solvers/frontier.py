"""The frontier of memory and time: the dynamic program on a family of grids, finest first.

A grid of fixed size resolves small budgets poorly when it spans large ones. So each grid spans four
times the last, a budget is answered by the best of all grids up to the first that spans it, and
more budget can never be slower. Grids round sizes up: where times fall steeply, what fits in exact
bytes is looked for a few steps beyond a budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.replay import Replay, replay
from evoplan.planner.schedules.schedule import Run, Sequence, allow_depth
from evoplan.planner.sizes import exact_size
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.grid import MANY, Times, unit_bytes
from evoplan.planner.solvers.reading import Reader

# Steps of one grid; rounding costs a schedule at most one per preserved part. The last grid, where
# schedules hold the most parts, has up to three times as many.
UNITS = 8_192
SPAN = 4  # each grid's range over the last
ROUNDING = 1e-9  # more than sums of the same times in another order differ by, as a share
# Beyond the first grid, checkpoints hold at most so many groups, or this often as many as there are for each
# state that fits, whichever is more.
LONG, SHARE = 48, 8
# Sizes are rounded up to the grid, so a schedule is found a little above its exact peak. Where the least time
# falls by more than this share at once, schedules of so many more grid steps are tried too.
STEEP, AHEAD = 0.01, 8
KEEP_BYTES = 128 << 20  # tables of programs kept beside the one at work; dropped ones are solved again


class InfeasibleError(ValueError):
    """No schedule fits.

    Attributes:
        least_bytes: the least budget that one fits.
        phase, step: what stands in the way there.
    """

    def __init__(self, budget_bytes: int, least: Replay) -> None:
        self.least_bytes, self.phase, self.step = least.peak_bytes, least.peak.phase, least.peak.step
        super().__init__(
            f"no plan fits {exact_size(budget_bytes)}; the least that does is {exact_size(self.least_bytes)}"
        )


@dataclass
class Frontier:
    """Fastest schedules of a chain for every budget. Budgets bound `Replay.peak_bytes`.

    Args:
        table: costs of the chain, for training.
        max_depth: how deep checkpoints may nest; None for any depth.

    Attributes:
        spans: memory that each grid spans, outputs excluded.
    """

    table: CostTable
    max_depth: int | None = None
    _times: dict[int, Times] = field(default_factory=dict, repr=False)
    _readers: dict[int, Reader] = field(default_factory=dict, repr=False)  # of the latest few programs
    _peaks: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)  # exact, by grid and units

    def __post_init__(self) -> None:
        table = self.table
        allow_depth(len(table.groups))
        self.output_bytes = table.bytes_of(table.liveness.outputs)
        # More memory than the fastest strategies take is of no use.
        self._everything = Sequence(
            tuple(Run(step, _fastest(options)) for step, options in enumerate(table.options))
        )
        self._most = replay(self._everything, table)
        self.most_bytes = self._most.peak_bytes - self.output_bytes
        needs = [min(cost.backward(True).bytes for cost in options) for options in table.options]
        self.spans = [min(2 * max(*needs, table.loss_bytes), self.most_bytes)]
        while self.spans[-1] < self.most_bytes:
            self.spans.append(min(SPAN * self.spans[-1], self.most_bytes))
        units = [UNITS] * (len(self.spans) - 1) + [UNITS * max(1, min(3, 256 // len(table.groups)))]
        self._units = [unit_bytes(*both, table) for both in zip(self.spans, units, strict=True)]

    def _reader(self, index: int) -> Reader:
        """Of the program on one grid; solved anew where it was dropped to save memory."""
        if index not in self._readers:
            unit = self._units[index]
            while sum(reader.program.nbytes for reader in self._readers.values()) > KEEP_BYTES:
                del self._readers[next(iter(self._readers))]
            units = -(-self.spans[index] // unit)
            program = Program(self.table, unit, units, self.max_depth, longest=self._longest(index))
            self._readers[index] = Reader(program)
            self._times[index] = program.times.copy()
        return self._readers[index]

    def _longest(self, index: int) -> int | None:
        """How many groups a checkpoint over whole groups may hold on one grid; None for any number.

        Cut in two, a long one takes no more time, and a state more memory. A grid is asked for budgets that
        the one before does not span: they hold so many states that one is little.
        """
        groups = len(self.table.groups)
        if index == 0 or groups <= MANY or not np.isfinite(self._grid_times(index - 1)[-1]):
            return None  # nothing less is known to fit
        states = max(1, self.spans[index - 1] // sum(self.table.state_bytes.values()))
        longest = max(LONG, SHARE * groups // states)
        return None if longest >= groups else longest

    def _grid_times(self, index: int) -> Times:
        """Least seconds on one grid, by budget in its units."""
        return self._times[index] if index in self._times else self._reader(index).program.times

    def _answers(self, budget_bytes: int) -> list[tuple[float, int, int]]:
        """(seconds, grid, memory in its units) of every grid asked for a budget."""
        memory = budget_bytes - self.output_bytes
        last = next((i for i, span in enumerate(self.spans) if span >= memory), len(self.spans) - 1)
        answers = []
        for index in range(last + 1):
            if index < last and self._beaten(index, last, memory):
                continue
            times = self._grid_times(index)
            units = min(memory // self._units[index], len(times) - 1)
            if units >= 0:
                answers.append((float(times[units]), index, units))
        return answers

    def _beaten(self, index: int, last: int, memory: int) -> bool:
        """Whether a coarser grid, as far as that is known without solving the finer one, has a faster answer.

        A schedule of the finer grid fits the coarser one too, with a unit more for each size that is rounded
        there: its time is no less than the coarser grid's with so much. Where rounding may take all there is,
        nothing is known, and the coarser grid is not solved to see. Nor where long checkpoints are left out.
        """
        if len(self.table.groups) > MANY:
            return False
        tensors = len(self.table.state_bytes)
        # Parts that are held together cover different steps, and keep a record or state; besides, what one
        # step needs, gradients and state.
        rounded = len(self.table.options) * tensors + 2 * tensors + 2
        unit = self._units[last]
        asked = min(memory, self.spans[last]) // unit
        there = -(-self.spans[index] // unit) + rounded
        if there >= asked:
            return False
        times = self._grid_times(last)
        return bool(times[there] * (1 - ROUNDING) > times[asked])

    def seconds(self, budget_bytes: int) -> float:
        """Least time within a budget; inf where nothing fits."""
        return self._best(budget_bytes)[0]

    def schedule(self, budget_bytes: int | None) -> Sequence:
        """The fastest schedule within a budget; None is unlimited.

        Raises:
            InfeasibleError: nothing fits.
        """
        if budget_bytes is None:
            budget_bytes = self._most.peak_bytes
        seconds, read = self._best(budget_bytes)
        if not np.isfinite(seconds):
            raise InfeasibleError(budget_bytes, self.least_replay)
        return read()

    def _best(self, budget_bytes: int) -> tuple[float, Callable[[], Sequence]]:
        """Least seconds, and how to read the schedule."""
        answers = self._answers(budget_bytes)
        if len(self.table.groups) <= MANY and any(np.isfinite(seconds) for seconds, *_ in answers):
            answers += [
                (seconds, index, units)
                for _, index, below in answers
                for seconds, units in self._ahead(index, below, below + AHEAD)
                if self._peak(index, units) <= budget_bytes
            ]
        found: list[tuple[float, Callable[[], Sequence]]] = [
            (seconds, partial(self._read, index, units)) for seconds, index, units in answers
        ]
        # Two schedules whose peaks are known exactly, not rounded up to a grid.
        if budget_bytes >= self._most.peak_bytes:
            found.append((self._most.seconds, lambda: self._everything))
        if not any(np.isfinite(seconds) for seconds, _ in found):
            fits = self.least_replay.peak_bytes <= budget_bytes
            found.append((self.least_replay.seconds if fits else np.inf, lambda: self.least))
        return min(found, key=lambda answer: answer[0])

    def _ahead(self, index: int, below: int, last: int) -> list[tuple[float, int]]:
        """Steep falls of the least time on a grid, past one of its budgets and up to another: seconds, units.

        Which falls are steep is no matter of the budget: found ahead of one, they are found for larger ones.
        """
        times = self._grid_times(index)[below : last + 1]
        steep = np.flatnonzero(times[1:] * (1 + STEEP) < times[:-1]) + 1
        return [(float(times[fall]), below + int(fall)) for fall in steep]

    def _peak(self, index: int, units: int) -> int:
        """Exact peak of the schedule that a grid has for some of its units."""
        if (index, units) not in self._peaks:
            self._peaks[index, units] = replay(self._read(index, units), self.table).peak_bytes
        return self._peaks[index, units]

    def _read(self, index: int, units: int) -> Sequence:
        return self._reader(index).schedule(units)

    @cached_property
    def _least_on_grids(self) -> tuple[int, int] | None:
        """The first grid with a schedule, and the least memory in its units; None if no grid has one."""
        for index in range(len(self.spans)):
            feasible = np.flatnonzero(np.isfinite(self._grid_times(index)))
            if feasible.size:
                return index, int(feasible[0])
        return None

    @cached_property
    def least(self) -> Sequence:
        """A schedule for the least budget, to the resolution of the first grid that has one."""
        return self._everything if self._least_on_grids is None else self._read(*self._least_on_grids)

    @cached_property
    def least_replay(self) -> Replay:
        """What that schedule costs; its peak is the least feasible budget."""
        return replay(self.least, self.table)

    def budgets(self, count: int) -> list[int]:
        """Budgets from the least to the largest of any use, evenly spaced on a logarithmic scale."""
        first = last = self._most.peak_bytes
        if self._least_on_grids is not None:  # without a replay, which may find that it needs less
            index, units = self._least_on_grids
            first = self.output_bytes + units * self._units[index]
        return sorted(
            {int(budget) for budget in np.geomspace(first, max(first, last), count)} | {first, last}
        )

    def steps(self) -> list[tuple[int, float]]:
        """The whole frontier: each budget at which the least time falls, and that time; bytes and seconds.

        From one step's budget on up to the next the least time is the one's: `seconds`, of any budget.
        """
        budgets = {self.least_replay.peak_bytes, self._most.peak_bytes}
        for index, unit in enumerate(self._units):
            times = self._grid_times(index)
            falls = np.flatnonzero(times < np.concatenate(([np.inf], times[:-1])))
            # A grid is asked for what the one before does not span.
            first = self.spans[index - 1] + 1 if index else 0
            budgets |= {self.output_bytes + int(units) * unit for units in falls}
            if len(self.table.groups) <= MANY:
                budgets |= {
                    max(self._peak(index, units), self.output_bytes + (units - AHEAD) * unit)
                    for _, units in self._ahead(index, first // unit, len(times) - 1)
                }
            budgets.add(self.output_bytes + first)
        found: list[tuple[int, float]] = []
        for budget in sorted(budgets):
            seconds = self.seconds(budget)
            if seconds < (found[-1][1] if found else np.inf):
                found.append((budget, seconds))
        return found


def _fastest(options: tuple[StepCost, ...]) -> Strategy:
    """The strategy of a recorded step where memory is no matter; of equally fast ones, the leanest."""
    best = min(options, key=lambda cost: (cost.forward_seconds + cost.backward_seconds, cost.preserved_bytes))
    return best.strategy
