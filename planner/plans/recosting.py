"""Costs of a plan that is there already."""

from __future__ import annotations

from evoplan.cost_model.times_cache import MissingTimesError
from evoplan.planner.plans.plan import Plan
from evoplan.planner.problems.costing import Costed, Progress, cost_problem
from evoplan.planner.problems.timing import cost_with_times
from evoplan.planner.schedules.schedule import opaque_kernels, strategies_used


def cost_of_plan(
    plan: Plan, path: str | None = None, progress: Progress = lambda _: None
) -> tuple[Costed, str | None]:
    """Costs of a plan's problem with the kind of times that it was made with.

    Returns:
        The costs; and why they are another kind, where this machine has none of that one.

    Raises:
        MissingTimesError: the plan runs kernels whose memory is only known where they were profiled.
    """
    kind = plan.costs["time"]
    strategies = strategies_used(plan.schedule)
    try:
        costed = cost_with_times(plan.problem, kind, path, progress=progress)  # type: ignore[arg-type]
        offered = ({cost.strategy for cost in options} for options in costed.table.options)
        if all(strategies[step] <= known for step, known in enumerate(offered)):
            return costed, None
        lost = f"some {kind} times are missing here"
    except MissingTimesError:
        lost = f"no {kind} times here"
    opaque = opaque_kernels(plan.schedule)
    if opaque:
        raise MissingTimesError(
            f"the plan runs {', '.join(opaque)}, of which nothing is known here; "
            "run `evoplan profile` for its model, shapes and dtype first"
        )
    return cost_problem(plan.problem, progress=progress), lost
