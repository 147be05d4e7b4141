"""How far from optimal may a plan be? Bounds from several solvers, each with the class it holds for."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from evoplan.cost_model.costs import CostTable
from evoplan.planner.plans.plan import Certificate, Plan, SolverReport
from evoplan.planner.problems.costing import Costed
from evoplan.planner.schedules.schedule import Sequence, depth
from evoplan.planner.solvers import Frontier
from evoplan.planner.solvers.any_order import MANY_STEPS, any_order_bound
from evoplan.planner.solvers.bounds import LowerBound
from evoplan.planner.solvers.offload_frontier import offload_bound
from evoplan.planner.solvers.proof import best_proof

ROUNDING = "dynamic program on costs rounded down"
CP_SAT = "CP-SAT"
CLOSE = 0.01  # gap for which no finer grid is solved
MOST_PROVEN = 256  # groups, for which the relaxed program takes seconds
ANY_ORDER = "runs that are owed, memory at a price"

Told = Callable[[str], None]


def certify(costed: Costed, plan: Plan, progress: Told = lambda _: None) -> Plan:
    """The plan with what can be proven of it.

    Raises:
        ValueError: the plan is for inference, where the solver is exact.
    """
    check_training(plan)
    budget = costed.chain_budget()
    if costed.table.host_bytes:
        return plan.model_copy(update={"solver": _proven_with_host(costed, plan)})
    after, planned = costed.reduction_seconds, plan.predicted.step_seconds  # `after` is of any schedule
    report = proven(costed.table, plan.schedule, budget, plan.solver, after, planned, progress)
    return plan.model_copy(update={"solver": report})


def _proven_with_host(costed: Costed, plan: Plan) -> SolverReport:
    """A solver's report with what can be proven where something may wait in host memory."""
    start, budget = time.perf_counter(), costed.chain_budget()
    bound = offload_bound(costed.table, costed.table.most_bytes if budget is None else budget)
    planned, after = plan.predicted.step_seconds, costed.reduction_seconds
    found = _certificate(ROUNDING, None, bound + after, planned, start).model_copy(update={"waits": True})
    return plan.solver.model_copy(update={"gap": found.gap, "certificates": (found,)})


def check_training(plan: Plan) -> None:
    """ValueError for a plan of which nothing is left to prove."""
    if not plan.problem.training:
        raise ValueError(
            "--certify is for training: an inference plan is the fastest on offer as it is (solver.gap is 0)"
        )


def proven(
    table: CostTable,
    schedule: Sequence,
    budget: int | None,
    solver: SolverReport,
    after: float,
    planned: float,
    progress: Told = lambda _: None,
) -> SolverReport:
    """A solver's report with what can be proven of its schedule.

    Args:
        budget: in bytes, for the chain alone; None is unlimited.
        after: seconds of a step that are the same under any schedule.
        planned: seconds of the step under this one.
    """
    if budget is None:
        budget = table.most_bytes
    progress("bounding every depth")
    start = time.perf_counter()
    bound = least_possible(table, budget, planned - after)
    found = [_certificate(ROUNDING, None, bound + after, planned, start)]
    from evoplan.planner.solvers import cp_sat  # OR-Tools takes a while to import

    if cp_sat.applies(table):
        progress("CP-SAT")
        start = time.perf_counter()
        # What holds for every depth holds for one; the search may be cut off before it knows as much.
        flat = max(bound, LowerBound(table, max_depth=1).seconds(budget))
        best = Frontier(table, max_depth=1).seconds(budget)
        searched = cp_sat.answer(table, budget, max_depth=1, optimistic=True, known_seconds=best)
        flat, best = max(flat, searched.bound_seconds), best + after
        if depth(schedule) <= 1:
            best = min(best, planned)
        found.append(_certificate(CP_SAT, 1, flat + after, best, start))
    if len(table.options) <= MANY_STEPS:
        progress("bounding every order")
        start = time.perf_counter()
        anyhow = any_order_bound(table, budget) + after
        found.append(_certificate(ANY_ORDER, None, anyhow, planned, start, persistent=False))
    return solver.model_copy(update={"gap": found[0].gap, "certificates": tuple(found)})


def least_possible(table: CostTable, budget: int, planned: float) -> float:
    """Seconds below which no persistent schedule can be; inf if none fits.

    Args:
        planned: seconds of a schedule; a bound that leaves more than CLOSE to it is looked at once more.
    """
    bound = LowerBound(table).seconds(budget, enough=planned / (1 + CLOSE))
    if len(table.groups) > MOST_PROVEN:
        return bound
    seconds = best_proof(table, budget).seconds
    return np.inf if seconds is None else max(bound, float(seconds))


def _certificate(
    method: str, max_depth: int | None, bound: float, best: float, start: float, persistent: bool = True
) -> Certificate:
    fits, known = bool(np.isfinite(bound)), bool(np.isfinite(best))
    return Certificate(
        method=method,
        max_depth=max_depth,
        persistent=persistent,
        bound_seconds=float(bound) if fits else None,
        best_seconds=float(best) if known else None,
        # A schedule costed by the replay may be faster than the program's charges allow.
        gap=max(0.0, float(best / bound - 1)) if fits and known and bound > 0 else None,
        seconds=time.perf_counter() - start,
    )
