"""From costs to a plan: solver, prediction, baselines."""

from __future__ import annotations

import time

from evoplan.planner.plans.plan import Plan, SolverReport
from evoplan.planner.plans.recosting import cost_of_plan
from evoplan.planner.problems.costing import (
    Costed,
    Progress,
    costed_step_name,
    only_whole,
    peaks_of_ranks,
)
from evoplan.planner.problems.digest import model_digest
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import Times, cost_with_times
from evoplan.planner.schedules.schedule import Sequence, shortened
from evoplan.planner.sizes import exact_size
from evoplan.planner.solvers import BASELINES, InfeasibleError, Solver, solver
from evoplan.planner.solvers.seed_dp import SeedProgram


class NoPlanError(ValueError):
    """Nothing fits the budget.

    Attributes:
        least_feasible_bytes: the least budget that has a plan.
    """

    def __init__(self, message: str, least_feasible_bytes: int) -> None:
        super().__init__(message)
        self.least_feasible_bytes = least_feasible_bytes


def solve(costed: Costed, solver_name: str = "dp") -> Plan:
    """Find the schedule.

    Raises:
        NoPlanError: nothing fits, or the named baseline does not.
    """
    start = time.perf_counter()
    find = solver(solver_name)
    if costed.problem.host_bytes and not find.uses_host:
        raise ValueError(
            f"{solver_name} lets nothing wait in host memory; leave that out, or use --solver dp"
        )
    schedule, peaks, all_room = _fitting(costed, find)
    seconds = time.perf_counter() - start
    budget = costed.problem.budget_bytes
    if budget is not None and max(peaks) > budget:
        raise NoPlanError(
            f"{solver_name} needs {exact_size(max(peaks))}, the budget is {exact_size(budget)}; "
            "use --solver dp or a larger budget",
            max(peaks),
        )
    exact = not costed.problem.training and find.exact_in_inference and all_room
    report = SolverReport(name=solver_name, seconds=seconds, gap=0.0 if exact else None)
    return plan_of(costed, schedule, report, peaks)


def _fitting(costed: Costed, find: Solver) -> tuple[Sequence, tuple[int, ...], bool]:
    """A schedule within the budget, each rank's peak under it, and whether the solver had all of the budget.

    The first rank's shards are the longest, but where lengths are unlike another rank may need a little more:
    it runs fewer pieces, or sends and receives unequal parts. Then the first one leaves room for that.
    """
    budget, room = costed.problem.budget_bytes, costed.chain_budget()
    try:
        schedule = find(costed.table, room)
        peaks = peaks_of_ranks(costed, schedule)
        while budget is not None and room is not None and peaks[0] <= budget < max(peaks):
            # As much less as is missing, and less than this schedule takes: another one.
            room = min(room - (max(peaks) - budget), peaks[0] - costed.fixed_bytes - 1)
            before, schedule = schedule, find(costed.table, room)
            if schedule == before:  # a baseline answers to no budget
                break
            peaks = peaks_of_ranks(costed, schedule)
    except InfeasibleError as error:
        least = costed.fixed_bytes + error.least_bytes
        if costed.unlike_ranks:
            schedule = find(costed.table, error.least_bytes)
            peaks = peaks_of_ranks(costed, schedule)
            least = max(peaks)
            if budget is not None and least <= budget:
                return schedule, peaks, False
        assert budget is not None  # without one everything fits
        end = "the loss" if error.phase == "loss" else "the end"
        step = end if error.step is None else costed_step_name(costed, error.step)
        raise NoPlanError(
            f"no plan fits a budget of {exact_size(budget)}; the least that does is {exact_size(least)} "
            f"(what stands in the way: {error.phase} of {step})",
            least,
        ) from None
    return schedule, peaks, room == costed.chain_budget()


def plan_of(
    costed: Costed, schedule: Sequence, report: SolverReport, peaks: tuple[int, ...] | None = None
) -> Plan:
    """The plan that a schedule makes; `peaks` are the ranks', if they are known."""
    peaks = peaks_of_ranks(costed, schedule) if peaks is None else peaks
    return Plan(
        problem=costed.problem,
        costs=costed.sources,
        solver=report,
        predicted=_of_largest(costed.predict(schedule), peaks),
        rank_peak_bytes=peaks,
        static=costed.static,
        baselines=predict_baselines(costed, costed.chain_budget()),
        least_feasible_bytes=None,
        only_whole=only_whole(costed),
        model_digest=model_digest(getattr(costed.model, "stack", costed.model)),
        schedule=schedule,
    )


def _of_largest(predicted: Prediction, peaks: tuple[int, ...]) -> Prediction:
    """The prediction of the rank that needs the most."""
    more = max(peaks) - predicted.peak_bytes
    activations = predicted.activation_bytes + more
    return predicted.model_copy(update={"peak_bytes": max(peaks), "activation_bytes": activations})


def cost_and_solve(
    problem: Problem,
    solver_name: str = "dp",
    times: Times = "auto",
    cache: str | None = None,
    progress: Progress = lambda _: None,
) -> tuple[Costed, Plan]:
    """Costs and plan with times of a kind.

    Measured times may lack strategies that need less memory than those that were measured. Where nothing fits
    and the kind is auto, the calibrated times, which lack none, have the last word.

    Args:
        times, cache: as in `cost_with_times`.

    Raises:
        NoPlanError: nothing fits.
    """
    costed = cost_with_times(problem, times, cache, progress=lambda name: progress(f"tracing {name}"))
    progress("solving")
    try:
        return costed, solve(costed, solver_name)
    except NoPlanError:
        if times != "auto" or costed.times.name != "measured":
            raise
    progress("tracing with calibrated times")
    costed = cost_with_times(problem, "calibrated", cache)
    return costed, solve(costed, solver_name)


def solve_for_fewest_ranks(
    problem: Problem,
    solver_name: str = "dp",
    progress: Progress = lambda _: None,
    times: Times = "roofline",
    cache: str | None = None,
) -> tuple[Costed, Plan]:
    """Costs and plan for as few ranks (1, 2, 4, ...) as the budget needs.

    Args:
        times, cache: as in `cost_and_solve`.

    Raises:
        NoPlanError: the budget is too small for as many ranks as the shapes can be cut for.
    """
    for ranks in (2**power for power in range(min(problem.lengths()).bit_length())):
        progress(f"tracing a share of {ranks}")
        try:
            return cost_and_solve(problem.model_copy(update={"ranks": ranks}), solver_name, times, cache)
        except NoPlanError as error:
            tried = error
    raise NoPlanError(f"{ranks} ranks are too few: {tried}", tried.least_feasible_bytes)


def predict_baselines(costed: Costed, chain_budget: int | None) -> dict[str, Prediction]:
    """The named baselines on the same costs; in inference there is nothing to recompute.

    Args:
        chain_budget: for seed-dp, the only one that answers to a budget; left out where it finds nothing.
    """
    table = costed.table
    if not costed.problem.training:
        return {"none": costed.predict(BASELINES["none"](table))}
    found = {name: make(table) for name, make in BASELINES.items()}
    flat = SeedProgram(table).schedule(chain_budget)
    if flat is not None:
        found["seed-dp"] = flat
    return {name: costed.predict(schedule) for name, schedule in found.items()}


def shorten_plan(plan: Plan, blocks: int, progress: Progress = lambda _: None) -> Plan:
    """The plan for the first blocks of its stack, cut off, costed anew; it answers to no budget."""
    config = plan.problem.config.with_blocks(blocks)
    problem = plan.problem.model_copy(update={"config": config, "budget_bytes": None})
    costed, _ = cost_of_plan(plan.model_copy(update={"problem": problem}), progress=progress)
    schedule = shortened(plan.schedule, len(costed.table.options))
    peaks = peaks_of_ranks(costed, schedule)
    return plan.model_copy(
        update={
            "problem": problem,
            "costs": costed.sources,
            "predicted": _of_largest(costed.predict(schedule), peaks),
            "rank_peak_bytes": peaks,
            "static": costed.static,
            "model_digest": model_digest(getattr(costed.model, "stack", costed.model)),
            "baselines": predict_baselines(costed, None),
            "schedule": schedule,
        }
    )
