"""Times that plans hang on, measured once more.

A plan takes what is fastest. Of many strategies that take nearly the same time that is one which was measured
too low, and the plan is slower than it was thought to be (the winner's curse). So what plans choose is timed
anew, its first times are forgotten, and plans are made again, until they choose nothing that was timed once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Protocol

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.times_cache import Key, Timing
from evoplan.model.running.chain import Chain, Step
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.problems.costing import Costed
from evoplan.planner.schedules.schedule import strategies_used
from evoplan.planner.solvers.frontier import Frontier

BUDGETS, MORE = 8, 2  # plans that are made, and how many times as many runs as at first


class Timer(Protocol):
    """What times steps, and keeps their times."""

    def key(self, step: Step, strategy: Strategy) -> Key:
        """What a time depends on: equal for steps that are the same."""

    def kept(self, step: Step, strategy: Strategy) -> tuple[Timing | None, bool]:
        """The time that is kept; and whether it was measured once more."""

    def time(self, step: Step, strategies: Collection[Strategy], more: int) -> dict[Strategy, Timing]:
        """Time a step, `more` times as often as usual."""

    def confirm(self, step: Step, strategy: Strategy, timing: Timing) -> None:
        """Keep a time in place of the first."""


def confirm(costed: Callable[[], Costed], timer: Timer) -> None:
    """Time anew what plans along the frontier choose.

    Args:
        costed: the problem, which is for training, with the times that are kept.
    """
    while todo := list(_unconfirmed(costed(), timer)):  # fewer strategies are left every time
        for step, strategies in todo:
            _confirm_step(step, strategies, timer)


def _unconfirmed(costed: Costed, timer: Timer) -> Iterator[tuple[Step, list[Strategy]]]:
    """Distinct steps, and of each the strategies in plans that were timed only once."""
    chosen: dict[Key, dict[Strategy, None]] = {}
    places: dict[Key, Step] = {}
    used = _in_plans(costed.table)
    for step in Chain.of(costed.model.train()).steps:
        key = timer.key(step, WHOLE)
        places.setdefault(key, step)
        chosen.setdefault(key, {}).update(dict.fromkeys(used[step.index]))
    for key, strategies in chosen.items():
        kept = {strategy: timer.kept(places[key], strategy) for strategy in strategies}
        left = [strategy for strategy, (timing, again) in kept.items() if timing and not again]
        if left:
            yield places[key], left


def _in_plans(table: CostTable) -> list[set[Strategy]]:
    """Of each step, the strategies in plans along the frontier."""
    frontier = Frontier(table)
    found: list[set[Strategy]] = [set() for _ in table.options]
    for budget in frontier.budgets(BUDGETS):
        for step, strategies in strategies_used(frontier.schedule(budget)).items():
            found[step] |= strategies
    return found


def _confirm_step(step: Step, strategies: list[Strategy], timer: Timer) -> None:
    """Keep new times of a step; where a machine is slower now than it was, a whole run has been, too."""
    before, _ = timer.kept(step, WHOLE)
    times = timer.time(step, dict.fromkeys([*strategies, *([WHOLE] if before else [])]), MORE)
    speed = 1.0 if before is None else _total(before) / _total(times[WHOLE])
    for strategy in strategies:
        timing = times[strategy]
        timer.confirm(step, strategy, _scaled(timing, speed))


def _scaled(timing: Timing, factor: float) -> Timing:
    discard, forward, backward, unread = (factor * seconds for seconds in timing[:4])
    return Timing(discard, forward, backward, unread, timing.spread)


def _total(timing: Timing) -> float:
    return timing.discard + timing.forward + timing.backward
