"""The frontier of memory and time: the dynamic program on a family of grids, finest first.

A grid of fixed size resolves small budgets poorly when it spans large ones. So each grid spans four
times the last, a budget is answered by the best of all grids up to the first that spans it, and
more budget can never be slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from cost_model.costs import CostTable
from model.strategy import WHOLE
from planner.replay import Replay, replay
from planner.schedule import Run, Sequence
from planner.solvers.dp import Program

UNITS = 12_288  # steps of one grid: rounding costs a schedule at most one unit per preserved part
SPAN = 4  # each grid's range over the last


class InfeasibleError(ValueError):
    """No schedule fits.

    Attributes:
        least_bytes: the least budget that one fits.
        phase, step: what stands in the way there.
    """

    def __init__(self, budget_bytes: int, least: Replay) -> None:
        self.least_bytes, self.phase, self.step = least.peak_bytes, least.peak.phase, least.peak.step
        super().__init__(f"no plan fits {budget_bytes} bytes; the least that does is {self.least_bytes}")


@dataclass
class Frontier:
    """Fastest schedules of a chain for every budget. Budgets bound `Replay.peak_bytes`.

    Args:
        table: costs of the chain, for training.
        max_depth: how deep checkpoints may nest; None for any depth.
    """

    table: CostTable
    max_depth: int | None = None
    _programs: list[Program] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        table = self.table
        self.output_bytes = table.bytes_of(table.liveness.outputs)
        # More than it takes to keep everything is of no use.
        self._everything = Sequence(tuple(Run(step, WHOLE) for step in range(len(table.options))))
        self._most = replay(self._everything, table)
        self.most_bytes = self._most.peak_bytes - self.output_bytes
        needs = [min(cost.backward_bytes for cost in options) for options in table.options]
        self._spans = [min(2 * max(*needs, table.loss_bytes), self.most_bytes)]
        while self._spans[-1] < self.most_bytes:
            self._spans.append(min(SPAN * self._spans[-1], self.most_bytes))

    def _program(self, index: int) -> Program:
        while len(self._programs) <= index:
            unit = _unit_bytes(self._spans[len(self._programs)], self.table)
            units = -(-self._spans[len(self._programs)] // unit)
            self._programs.append(Program(self.table, unit, units, self.max_depth))
        return self._programs[index]

    def _answers(self, budget_bytes: int) -> list[tuple[float, Program, int]]:
        """(seconds, program, memory in its units) of every grid asked for a budget."""
        memory = budget_bytes - self.output_bytes
        answers = []
        for index, span in enumerate(self._spans):
            program = self._program(index)
            units = min(memory // program.unit_bytes, program.size - 1)
            if units >= 0:
                answers.append((float(program.times[units]), program, units))
            if span >= memory:
                break
        return answers

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
        found: list[tuple[float, Callable[[], Sequence]]] = [
            (seconds, partial(program.schedule, units))
            for seconds, program, units in self._answers(budget_bytes)
        ]
        # Two schedules whose peaks are known exactly, not rounded up to a grid.
        if budget_bytes >= self._most.peak_bytes:
            found.append((self._most.seconds, lambda: self._everything))
        if not any(np.isfinite(seconds) for seconds, _ in found):
            fits = self.least_replay.peak_bytes <= budget_bytes
            found.append((self.least_replay.seconds if fits else np.inf, lambda: self.least))
        return min(found, key=lambda answer: answer[0])

    @cached_property
    def least(self) -> Sequence:
        """A schedule for the least budget, to the resolution of the first grid that has one."""
        for index in range(len(self._spans)):
            program = self._program(index)
            feasible = np.flatnonzero(np.isfinite(program.times))
            if feasible.size:
                return program.schedule(int(feasible[0]))
        return self._everything

    @cached_property
    def least_replay(self) -> Replay:
        """What that schedule costs; its peak is the least feasible budget."""
        return replay(self.least, self.table)

    def budgets(self, count: int) -> list[int]:
        """Budgets from the least to the largest of any use, evenly spaced on a logarithmic scale."""
        first, last = self.least_replay.peak_bytes, self._most.peak_bytes
        return sorted(
            {int(budget) for budget in np.geomspace(first, max(first, last), count)} | {first, last}
        )


def _unit_bytes(span: int, table: CostTable) -> int:
    """A grid step near span / UNITS in which the state's tensors round up to little more than they are."""
    smallest = max(1, -(-span // UNITS))
    sizes = list(table.state_bytes.values())
    candidates = {-(-sizes[0] // n) for n in range(1, sizes[0] // smallest + 1)} if smallest > 1 else {1}
    near = [unit for unit in candidates if smallest <= unit <= 1.1 * smallest] or [smallest]
    return min(near, key=lambda unit: (sum(-size % unit for size in sizes) / unit, unit))


def inference_schedule(table: CostTable, budget_bytes: int | None) -> Sequence:
    """Without backward every step is on its own: the fastest strategy that fits beside the state.

    Raises:
        InfeasibleError: some step fits under no strategy.
    """
    runs, least = [], []
    for step, options in enumerate(table.options):
        held = table.bytes_of(table.liveness.alive(step))
        least.append(Run(step, min(options, key=lambda cost: cost.discard_bytes).strategy))
        fitting = [
            cost for cost in options if budget_bytes is None or held + cost.discard_bytes <= budget_bytes
        ]
        if fitting:
            runs.append(Run(step, min(fitting, key=lambda cost: cost.forward_seconds).strategy))
    if len(runs) < len(table.options):
        raise InfeasibleError(budget_bytes or 0, replay(Sequence(tuple(least)), table))
    return Sequence(tuple(runs))
