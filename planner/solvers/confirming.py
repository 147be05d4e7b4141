"""Times that plans hang on, measured once more.

A plan takes what is fastest. Of many strategies that take nearly the same time that is one which was measured
too low, and the plan is slower than it was thought to be (the winner's curse). So what plans choose is timed
anew, its first times are forgotten, and plans are made again, until they choose nothing that was timed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.schedule import strategies_used
from evoplan.planner.solvers.frontier import Frontier

BUDGETS = 8  # along the frontier, for which plans are made
MORE = 2  # times as many runs as at first

Again = Callable[[int, Sequence[StepCost]], Sequence[StepCost]]
Chosen = dict[int, set[Strategy]]  # by step; of equal steps, the first


Told = Callable[[int, Strategy], bool]  # of a step under a strategy


def confirmed(
    table: CostTable,
    again: Again,
    known: Told = lambda step, strategy: False,
    able: Told = lambda step, strategy: True,
) -> tuple[CostTable, Chosen]:
    """A table with new times of all that plans along the frontier choose.

    Args:
        table: for training, with measured times.
        again: times a step under some of its strategies, `MORE` times as often: their costs with these times.
        known: whether a step's time under a strategy was measured so before.
        able: whether it can be: one that was too large to be measured at first is none to be tried now.

    Returns:
        The table, and what was timed.
    """
    done: Chosen = {}
    first = {id(costs): step for step, costs in reversed([*enumerate(table.options)])}
    places = [first[id(costs)] for costs in table.options]  # fewer choices are left in every pass
    while todo := dict(_left(table, places, done, known, able)):
        new = {step: _anew(step, table.options[step], left, again, able) for step, left in todo.items()}
        table = replace(
            table,
            options=tuple(new.get(at, costs) for at, costs in zip(places, table.options, strict=True)),
        )
        for step, left in todo.items():
            done.setdefault(step, set()).update(left)
    return table, done


def _left(
    table: CostTable, places: Sequence[int], done: Chosen, known: Told, able: Told
) -> Iterator[tuple[int, set[Strategy]]]:
    """Of distinct steps, what plans choose and nobody has timed again."""
    chosen: Chosen = {step: set() for step in places}
    frontier = Frontier(table)
    for budget in frontier.budgets(BUDGETS):
        for step, strategies in strategies_used(frontier.schedule(budget)).items():
            chosen[places[step]] |= strategies
    for step, strategies in chosen.items():
        left = {s for s in strategies - done.get(step, set()) if able(step, s) and not known(step, s)}
        if left:
            yield step, left


def _anew(
    step: int, costs: tuple[StepCost, ...], left: set[Strategy], again: Again, able: Told
) -> tuple[StepCost, ...]:
    """A step's costs with new times of some; a whole run tells how much slower the machine is than it was."""
    beside = [cost for cost in costs if cost.strategy == WHOLE and able(step, WHOLE)]
    others = [cost for cost in costs if cost.strategy in left and cost not in beside]
    timed = again(step, [*beside, *others])
    speed = _seconds(beside[0]) / max(_seconds(timed[0]), 1e-12) if beside else 1.0
    found = {cost.strategy: _scaled(cost, speed) for cost in timed[len(beside) :]}
    return tuple(found.get(cost.strategy, cost) for cost in costs)


def _seconds(cost: StepCost) -> float:
    return cost.discard_seconds + cost.forward_seconds + cost.backward_seconds


def _scaled(cost: StepCost, factor: float) -> StepCost:
    return replace(
        cost,
        discard_seconds=factor * cost.discard_seconds,
        forward_seconds=factor * cost.forward_seconds,
        backward_seconds=factor * cost.backward_seconds,
        unread=cost.unread and cost.unread._replace(seconds=factor * cost.unread.seconds),
    )
