"""The frontier of memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from evoplan.planner.plans.planning import predict_baselines
from evoplan.planner.problems.costing import (
    Costed,
    Progress,
)
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.solvers import BASELINES, Frontier
from evoplan.planner.solvers.offload_frontier import OffloadFrontier
from evoplan.planner.solvers.seed_dp import SeedProgram

FLAT_POINTS = 12  # of seed-dp in a sweep


def sweep(
    costed: Costed,
    count: int | None = None,
    progress: Progress = lambda _: None,
    found: Frontier | OffloadFrontier | None = None,
) -> dict[str, Any]:
    """The frontier as `points`, baselines, and seed-dp's points.

    Args:
        count: how many budgets, evenly spaced on a logarithmic scale, each with its plan's own peak:
            {budget_bytes, peak_bytes, step_seconds}. None: every step of the exact frontier,
            {budget_bytes, step_seconds}, whose plans are not made.
        progress: called before each.
        found: the frontier of these costs, if it is at hand.
    """
    frontier = Frontier(costed.table) if found is None else found
    if count is not None:
        points = frontier_points(costed, frontier, count, progress)
    elif isinstance(frontier, Frontier):
        points = steps_of(costed, frontier)
    else:
        raise ValueError(
            "where something may wait in host memory a sweep is of so many budgets; give how many"
        )
    progress("seed-dp")
    flat = SeedProgram(costed.table)
    reach = replay(flat.least(), costed.table).peak_bytes, frontier.most_bytes + frontier.output_bytes
    large = replay(BASELINES["large"](costed.table), costed.table).peak_bytes
    # seed-dp answers to a budget: its mark is for the peak of `large`, or failing that for the least it can.
    marked = max(large, reach[0] + reach[0] // 50)
    budgets = sorted({*map(int, np.geomspace(*reach, FLAT_POINTS)), marked})
    schedules = [(budget, flat.schedule(budget)) for budget in budgets]
    return {
        "title": _title(costed.problem),
        "problem": costed.problem.model_dump(mode="json"),
        "costs": costed.sources,
        "static_bytes": sum(costed.static.values()),
        "points": points,
        "seed_dp_points": [
            _point(costed, budget, schedule) for budget, schedule in schedules if schedule is not None
        ],
        "baselines": {
            name: baseline.model_dump() for name, baseline in predict_baselines(costed, marked).items()
        },
    }


def steps_of(costed: Costed, frontier: Frontier) -> list[dict[str, float]]:
    """Every step of the exact frontier, from the least budget on: {budget_bytes, step_seconds}."""
    return [
        {
            "budget_bytes": costed.fixed_bytes + budget,
            "step_seconds": seconds + costed.reduction_seconds,
        }
        for budget, seconds in frontier.steps()
    ]


def frontier_points(
    costed: Costed, frontier: Frontier | OffloadFrontier, count: int, progress: Progress = lambda _: None
) -> list[dict[str, float]]:
    """The fastest plans for so many budgets, from the least on: {budget_bytes, peak_bytes, step_seconds}."""
    found = planned_points(costed, frontier, count, progress)
    return [_row(budget, predicted) for budget, predicted, _ in found]


def planned_points(
    costed: Costed, frontier: Frontier | OffloadFrontier, count: int, progress: Progress = lambda _: None
) -> Iterator[tuple[int, Prediction, Sequence]]:
    """The same with their schedules: budget in bytes, static memory included, prediction, schedule."""
    for number, budget in enumerate(frontier.budgets(count), start=1):
        progress(f"budget {number}")
        schedule = frontier.schedule(budget)
        yield costed.fixed_bytes + budget, costed.predict(schedule), schedule


def _point(costed: Costed, budget: int, schedule: Sequence) -> dict[str, float]:
    return _row(costed.fixed_bytes + budget, costed.predict(schedule))


def _row(budget: int, predicted: Prediction) -> dict[str, float]:
    return {
        "budget_bytes": budget,
        "peak_bytes": predicted.peak_bytes,
        "step_seconds": predicted.step_seconds,
    }


def _title(problem: Problem) -> str:
    return f"{problem.config.n_block} blocks, {problem.shape}, {problem.precision}, {problem.device}"
