"""Rotor's dynamic program: each stage of a chain is saved or recomputed, and nothing else.

C(s, t, m) is the least time to run stages s to t forward and backward where the input of s is held and m
bytes are free beside it. Either s keeps all that its backward wants,

    C(s, t, m) = forward(s) + C(s + 1, t, m - kept(s)) + backward(s)

or s to k - 1 are run without keeping anything, k's input is held, and they run again in backward,

    C(s, t, m) = discard(s..k-1) + C(k, t, m - input(k)) + C(s, k - 1, m).

Stages are blocks where there are many steps, as Rotor's users have it, and steps otherwise. They run whole.
Memory is charged as the paper does, by stage; the replay is the judge: the program is given less until its
schedule fits, and more while it does not fill the budget.

Source: Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova (2019), Optimal checkpointing for heterogeneous
chains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.schedules.replay import Replay, replay
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, allow_depth
from evoplan.planner.solvers import InfeasibleError
from evoplan.planner.solvers.inference import inference_schedule

UNITS = 200  # of memory, in which the program counts
MOST_STEPS = 100  # of a chain whose stages are its steps
TRIES = 6  # halvings of what the program is given


class Stage(NamedTuple):
    """A part of the chain: bytes and seconds."""

    steps: range
    input_bytes: int
    kept_bytes: int
    forward_extra: int
    backward_extra: int
    discard_extra: int
    discard_seconds: float
    forward_seconds: float
    backward_seconds: float


def stages_of(table: CostTable) -> list[Stage]:
    """The chain's stages, every step whole: its blocks, or its steps where these are few."""
    few = len(table.options) <= MOST_STEPS
    parts = [range(i, i + 1) for i in range(len(table.options))] if few else list(table.groups)
    known: dict[tuple[int, ...], Stage] = {}
    found = []
    for part in parts:
        key = tuple(id(table.options[step]) for step in part)
        if key not in known:
            known[key] = _stage(table, part)
        found.append(known[key]._replace(steps=part))
    return found


def _whole(options: tuple[StepCost, ...]) -> StepCost:
    return next(cost for cost in options if cost.strategy == WHOLE)


def _stage(table: CostTable, part: range) -> Stage:
    costs = [_whole(table.options[step]) for step in part]
    kept = forward_extra = 0
    after = []  # kept by the end of each step
    for step, cost in zip(part, costs, strict=True):
        forward_extra = max(forward_extra, kept + cost.forward_bytes)
        kept += cost.preserved_bytes + table.made_bytes(step)
        after.append(kept)
    backward_extra = max(
        held - cost.preserved_bytes + cost.backward_bytes for held, cost in zip(after, costs, strict=True)
    )
    made = sum({name: table.state_bytes[name] for step in part for name in table.makes[step]}.values())
    return Stage(
        part, sum(table.state_bytes.values()), kept, forward_extra, backward_extra,
        made + max(cost.discard_bytes for cost in costs), sum(cost.discard_seconds for cost in costs),
        sum(cost.forward_seconds for cost in costs), sum(cost.backward_seconds for cost in costs),
    )  # fmt: skip


@dataclass
class Rotor:
    """The program for one chain and one budget; equal spans of equal stages are solved once."""

    stages: list[Stage]
    memory_bytes: int
    unit: int = field(init=False)
    classes: list[int] = field(init=False)
    times: dict[tuple[int, ...], NDArray[np.float64]] = field(default_factory=dict)
    choices: dict[tuple[int, ...], NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unit = max(1, -(-self.memory_bytes // UNITS))
        self.size = self.memory_bytes // self.unit + 1
        numbers: dict[Stage, int] = {}
        nameless = [stage._replace(steps=range(0)) for stage in self.stages]
        self.classes = [numbers.setdefault(stage, len(numbers)) for stage in nameless]
        self.period = self._period()
        for length in range(1, len(self.stages) + 1):
            for start in range(len(self.stages) - length + 1):
                key = self._key(start, length)
                if key not in self.times:
                    self.times[key], self.choices[key] = self._solved(start, length)

    def _period(self) -> int | None:
        """After how many stages the chain repeats; None where it does not."""
        count = len(self.classes)
        for period in range(1, min(count, 64) + 1):
            if all(self.classes[i] == self.classes[i - period] for i in range(period, count)):
                return period
        return None

    def _key(self, start: int, length: int) -> tuple[int, ...]:
        return (start if self.period is None else start % self.period, length)

    def _units(self, size: int) -> int:
        return -(-size // self.unit)

    def _shifted(self, times: NDArray[np.float64], units: int) -> NDArray[np.float64]:
        moved = np.full(self.size, np.inf)
        if units < self.size:
            moved[units:] = times[: self.size - units]
        return moved

    def _solved(self, start: int, length: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Least seconds by memory, and the first choice: 0 keeps the stage, n runs n stages to discard."""
        stage = self.stages[start]
        own = stage.forward_seconds + stage.backward_seconds
        if length == 1:
            best = np.full(self.size, own)
        else:
            best = (
                self._shifted(self.times[self._key(start + 1, length - 1)], self._units(stage.kept_bytes))
                + own
            )
        best[: min(self.size, self._units(max(stage.forward_extra, stage.backward_extra)))] = np.inf
        choice = np.zeros(self.size, dtype=np.int64)
        seconds, extra = 0.0, 0
        for count in range(1, length):
            passed = self.stages[start + count - 1]
            seconds, extra = seconds + passed.discard_seconds, max(extra, passed.discard_extra)
            held = self._units(self.stages[start + count].input_bytes)
            later = self._shifted(self.times[self._key(start + count, length - count)], held)
            found = later + (self.times[self._key(start, count)] + seconds)
            found[: min(self.size, self._units(extra))] = np.inf
            better = found < best
            best[better], choice[better] = found[better], count
        return best, choice

    def schedule(self) -> Sequence | None:
        """The fastest; None if nothing fits."""
        if not np.isfinite(self.times[self._key(0, len(self.stages))][-1]):
            return None
        return Sequence(tuple(self._read(0, len(self.stages), self.size - 1)))

    def _read(self, start: int, length: int, memory: int) -> list[Run | Checkpoint]:
        parts: list[Run | Checkpoint] = []
        while length:
            count = int(self.choices[self._key(start, length)][memory])
            if count:
                body = Sequence(tuple(self._read(start, count, memory)))
                parts.append(Checkpoint(body, (WHOLE,) * len(body.span)))
                memory -= self._units(self.stages[start + count].input_bytes)
            else:
                parts += [Run(step, WHOLE) for step in self.stages[start].steps]
                memory -= self._units(self.stages[start].kept_bytes)
                count = 1
            start, length = start + count, length - count
        return parts


def rotor(table: CostTable, budget_bytes: int | None) -> Sequence:
    """`rotor`: the fastest schedule that saves or recomputes whole stages.

    Raises:
        InfeasibleError: it finds none that fits.
    """
    if not table.training:
        return inference_schedule(table, budget_bytes)
    allow_depth(len(table.options))
    everything = Sequence(tuple(Run(step, WHOLE) for step in range(len(table.options))))
    if budget_bytes is None or replay(everything, table).peak_bytes <= budget_bytes:
        return everything
    stages = stages_of(table)
    best: tuple[float, Sequence] | None = None
    least: Replay | None = None
    low, high = 0.0, 1.5
    for _ in range(TRIES):
        share = (low + high) / 2
        found = Rotor(stages, int(budget_bytes * share)).schedule()
        if found is None:
            low = share
            continue
        played = replay(found, table)
        least = played if least is None or played.peak_bytes < least.peak_bytes else least
        if played.peak_bytes > budget_bytes:
            high = share
            continue
        low = share
        if best is None or played.seconds < best[0]:
            best = played.seconds, found
    if best is None:
        raise InfeasibleError(budget_bytes, least or replay(everything, table))
    return best[1]
