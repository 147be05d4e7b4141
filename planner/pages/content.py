"""What a page about a plan says: figures and tables, computed before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from evoplan.model.running.chain import Chain
from evoplan.planner.pages.account import Account, account_of
from evoplan.planner.pages.stack import Decisions, decisions
from evoplan.planner.pages.verified import Verified
from evoplan.planner.plans.plan import Plan, SolverReport
from evoplan.planner.plans.sweeping import frontier_points
from evoplan.planner.problems.costing import Costed, planned_model
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import Problem
from evoplan.planner.solvers import Frontier as Solved

POINTS = 40  # of a frontier


@dataclass(frozen=True)
class Frontier:
    """Points are (peak in bytes, seconds of a step).

    Attributes:
        points: the fastest plans, from the least memory on; none where nothing but the file is at hand.
        marks: the plan and the baselines, by name.
        budget: in bytes, or None.
        memories: of devices, in bytes, marked thinly.
    """

    points: tuple[tuple[int, float], ...]
    marks: dict[str, tuple[int, float]]
    budget: int | None
    memories: tuple[int, ...] = ()


@dataclass(frozen=True)
class Content:
    """All that a page says.

    Attributes:
        title, subtitle: what is run, and how.
        account: memory moment by moment; None where there are no costs, and `no_account` says why.
        beside: what the account leaves out, in a sentence; empty if nothing.
        verified: measured beside predicted, if anybody has.
        solver: who found it, and what is proven.
        costs: where figures come from, by name.
    """

    title: str
    subtitle: str
    budget: int | None
    predicted: Prediction
    static: dict[str, int]
    baselines: dict[str, Prediction]
    least_bytes: int | None
    decisions: Decisions
    frontier: Frontier
    solver: SolverReport
    costs: dict[str, str]
    account: Account | None = None
    no_account: str = ""
    beside: str = ""
    verified: Verified | None = None
    notes: tuple[str, ...] = ()


def frontier_of(
    predicted: Prediction,
    baselines: dict[str, Prediction],
    budget: int | None,
    points: Iterable[tuple[int, float]] = (),
) -> Frontier:
    """The plan among what else there is, from the least memory on."""
    every = {"plan": predicted, **baselines}
    marks = {name: (one.peak_bytes, one.step_seconds) for name, one in every.items()}
    return Frontier(_falling(points), marks, budget)


def _falling(points: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Those that are faster than all that need less."""
    kept: list[tuple[int, float]] = []
    for size, seconds in sorted(points):
        if not kept or seconds < kept[-1][1]:
            kept.append((size, seconds))
    return tuple(kept)


def content_of_plan(
    plan: Plan,
    costed: Costed | None,
    no_costs: str = "",
    verified: Verified | None = None,
) -> Content:
    """Of a plan of one of our own models.

    Args:
        costed: its costs; None where they cannot be had, and `no_costs` says why.
    """
    problem = plan.problem
    names = step_names_of(problem)
    points: list[tuple[int, float]] = []
    account, beside = None, ""
    if costed is not None:
        account = account_of(_title(problem), names, plan.schedule, costed.table, costed.static)
        if problem.training:
            found = frontier_points(costed, Solved(costed.table), POINTS)
            points = [(int(point["peak_bytes"]), point["step_seconds"]) for point in found]
        if problem.ranks > 1:
            beside = "Of the first rank; figures above are of the one that needs the most."
    notes = tuple(f"never in pieces: {name}" for name in plan.only_whole)
    return Content(
        title=_title(problem),
        subtitle=f"{problem.shape}, {problem.precision} {problem.mode} on {problem.device}"
        + (f", each of {problem.ranks} ranks" if problem.ranks > 1 else ""),
        budget=problem.budget_bytes,
        predicted=plan.predicted,
        static=plan.static,
        baselines=plan.baselines,
        least_bytes=plan.least_feasible_bytes,
        decisions=decisions(plan.schedule, names, problem.training),
        frontier=frontier_of(plan.predicted, plan.baselines, problem.budget_bytes, points),
        solver=plan.solver,
        costs=plan.costs,
        account=account,
        no_account=no_costs,
        beside=beside,
        verified=verified,
        notes=notes,
    )


def with_account(content: Content, account: Account, beside: str, points: Sequence[Prediction]) -> Content:
    """The content with what only the model at hand tells."""
    more = ((one.peak_bytes, one.step_seconds) for one in points)
    return replace(
        content,
        account=account,
        no_account="",
        beside=beside,
        frontier=frontier_of(content.predicted, content.baselines, content.budget, more),
    )


def step_names_of(problem: Problem) -> list[str]:
    """Names of the steps that a problem's plan is for."""
    return [step.name for step in Chain.of(planned_model(problem)).steps]


def _title(problem: Problem) -> str:
    return f"{problem.model}, {problem.config.n_block} blocks"
