"""How far from optimal may a plan be? Bounds from two solvers, each with the class it holds for."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from evoplan.planner.plans.plan import Certificate, Plan
from evoplan.planner.problems.costing import Costed
from evoplan.planner.schedules.schedule import depth
from evoplan.planner.solvers import Frontier, cp_sat
from evoplan.planner.solvers.bounds import LowerBound

ROUNDING = "dynamic program on costs rounded down"
CP_SAT = "CP-SAT"


def certify(costed: Costed, plan: Plan, progress: Callable[[str], None] = lambda _: None) -> Plan:
    """The plan with what can be proven of it.

    Raises:
        ValueError: the plan is for inference, where the solver is exact.
    """
    if not costed.problem.training:
        raise ValueError(
            "--certify is for training: an inference plan is the fastest on offer as it is (solver.gap is 0)"
        )
    table, budget = costed.table, costed.chain_budget()
    if budget is None:
        budget = cp_sat.most_bytes(table)
    progress("bounding every depth")
    start = time.perf_counter()
    after = costed.reduction_seconds  # of any schedule
    bound = LowerBound(table).seconds(budget) + after
    planned = plan.predicted.step_seconds
    found = [_certificate(ROUNDING, None, bound, planned, start)]
    if cp_sat.applies(table):
        progress("CP-SAT")
        start = time.perf_counter()
        bound = cp_sat.answer(table, budget, max_depth=1, optimistic=True).bound_seconds + after
        best = Frontier(table, max_depth=1).seconds(budget) + after
        if depth(plan.schedule) <= 1:
            best = min(best, planned)
        found.append(_certificate(CP_SAT, 1, bound, best, start))
    report = plan.solver.model_copy(update={"gap": found[0].gap, "certificates": tuple(found)})
    return plan.model_copy(update={"solver": report})


def _certificate(method: str, max_depth: int | None, bound: float, best: float, start: float) -> Certificate:
    fits, known = bool(np.isfinite(bound)), bool(np.isfinite(best))
    return Certificate(
        method=method,
        max_depth=max_depth,
        bound_seconds=float(bound) if fits else None,
        best_seconds=float(best) if known else None,
        # A schedule costed by the replay may be faster than the program's charges allow.
        gap=max(0.0, float(best / bound - 1)) if fits and known and bound > 0 else None,
        seconds=time.perf_counter() - start,
    )
