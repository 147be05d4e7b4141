"""The fastest plan of a whole step within a budget.

A solver knows the blocks; what is around them - embeddings, heads, the loss - takes memory of its own, at
other moments. So the room that it gets is what the budget leaves, and is corrected by what the simulation of
the whole step finds, until nothing more fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from evoplan.planner.fitting.by_hand import each_block_again
from evoplan.planner.fitting.problem import Fitting
from evoplan.planner.plans.planning import NoPlanError
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.sizes import exact_size, format_size
from evoplan.planner.solvers import BASELINES

TRIES = 12
CLOSE = 0.002  # of the budget: so little room is not asked for again


@dataclass(frozen=True)
class Fit:
    """A schedule and what the whole step takes under it."""

    schedule: Sequence
    predicted: Prediction


def fastest(fitting: Fitting, budget: int | None) -> Fit:
    """The fastest schedule whose whole step stays within a budget; None is unlimited.

    Raises:
        NoPlanError: there is none; says what is the least, and what stands in the way there.
    """
    unlimited = _fit(fitting, fitting.frontier.schedule(None))
    if budget is None or unlimited.predicted.peak_bytes <= budget:
        return unlimited
    least = least_fit(fitting)
    if least.predicted.peak_bytes > budget:
        raise NoPlanError(
            f"no plan fits a budget of {exact_size(budget)}; the least that does is "
            f"{exact_size(least.predicted.peak_bytes)} (what stands in the way: {_obstacle(fitting, least)})",
            least.predicted.peak_bytes,
        )
    return min(_within(fitting, budget, least), key=lambda fit: fit.predicted.step_seconds)


def least_fit(fitting: Fitting) -> Fit:
    """The schedule of the least peak among those that a solver finds for the least room."""
    frontier = fitting.frontier
    few = [frontier.least, *(frontier.schedule(budget) for budget in frontier.budgets(16)[:3])]
    return min((_fit(fitting, schedule) for schedule in few), key=lambda fit: fit.predicted.peak_bytes)


def sampled_frontier(
    fitting: Fitting, points: int, progress: Callable[[str], None] = lambda _: None
) -> list[Fit]:
    """Fits from the least memory to the fastest, each faster than those that need less.

    Args:
        progress: told of each that is through.
    """
    budgets, found = fitting.frontier.budgets(points), []
    for number, budget in enumerate(budgets, start=1):
        fit = _fit(fitting, fitting.frontier.schedule(budget))
        found.append(fit)
        progress(f"point {number} of {len(budgets)}: {format_size(fit.predicted.peak_bytes)}")
    kept: list[Fit] = []
    for fit in sorted([least_fit(fitting), *found], key=lambda fit: fit.predicted.peak_bytes):
        if not kept or fit.predicted.step_seconds < kept[-1].predicted.step_seconds:
            kept.append(fit)
    return kept


def baselines(fitting: Fitting) -> dict[str, Prediction]:
    """Nothing recomputed, and each block checkpointed."""
    schedules = {"none": BASELINES["none"](fitting.table), "large": each_block_again(fitting.table)}
    return {name: fitting.predict(schedule) for name, schedule in schedules.items()}


def _fit(fitting: Fitting, schedule: Sequence) -> Fit:
    return Fit(schedule, fitting.predict(schedule))


def _within(fitting: Fitting, budget: int, least: Fit) -> Iterator[Fit]:
    """Ever faster fits within the budget: the room between one that fits and one that does not is halved, or
    less where the simulation tells by how much the room was wrong.
    """
    frontier = fitting.frontier
    most = frontier.budgets(2)[-1]
    low, high = frontier.least_replay.peak_bytes, most
    yield least
    room = min(high, budget - _beside(fitting, least))
    for _ in range(TRIES):
        if not low <= room <= high:
            room = (low + high) // 2
        fit = _fit(fitting, frontier.schedule(room))
        spare = budget - fit.predicted.peak_bytes
        if spare >= 0:
            yield fit
            low = room + 1
        else:
            high = room - 1
        if low > high or 0 <= spare < CLOSE * budget:
            return
        room += spare


def _beside(fitting: Fitting, fit: Fit) -> int:
    """What a whole step takes more than its blocks do."""
    return fit.predicted.peak_bytes - replay(fit.schedule, fitting.table).peak_bytes


def _obstacle(fitting: Fitting, fit: Fit) -> str:
    """The block and the phase at the peak."""
    peak = replay(fit.schedule, fitting.table).peak
    where = "the loss" if peak.step is None else f"{peak.phase} of {fitting.captured.calls[peak.step].name}"
    return where
