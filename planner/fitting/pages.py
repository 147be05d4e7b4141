"""What a page says of a plan of `evoplan.fit`: from its file alone, or with the model at hand."""

from __future__ import annotations

from evoplan.planner.fitting.plan import FitPlan
from evoplan.planner.fitting.problem import Fitting
from evoplan.planner.fitting.solving import sampled_frontier
from evoplan.planner.pages.account import account_of
from evoplan.planner.pages.content import Content, frontier_of, with_account
from evoplan.planner.pages.stack import decisions
from evoplan.planner.pages.verified import Verified
from evoplan.planner.sizes import format_size

NO_COSTS = (
    "the file of a fitted model has no costs of its blocks; with the model at hand, "
    "evoplan.fit(model, args, plan=...) has report_html(path), memory_viz(path) and perfetto(path)"
)


def content_of_file(plan: FitPlan, verified: Verified | None = None) -> Content:
    """Schedule, static memory, prediction and baselines: what the file holds."""
    budget, predicted = plan.budget_bytes, plan.predicted
    return Content(
        title=f"{plan.model}, {len(plan.blocks)} blocks",
        subtitle=f"{plan.precision} training on {plan.device}, optimizer {plan.optimizer}, loss {plan.loss}",
        budget=budget,
        predicted=predicted,
        static=plan.static,
        baselines=plan.baselines,
        least_bytes=plan.least_feasible_bytes,
        decisions=decisions(plan.schedule, plan.blocks),
        frontier=frontier_of(predicted, plan.baselines, budget),
        solver=plan.solver,
        costs=plan.costs,
        no_account=NO_COSTS,
        verified=verified,
        notes=plan.notes,
    )


def content_of_fit(
    plan: FitPlan, fitting: Fitting, verified: Verified | None = None, points: int | None = 12
) -> Content:
    """The same, and what the costs of the blocks tell: memory over time and the frontier.

    Args:
        points: of the frontier, each a simulation of the whole step; None for no frontier.
    """
    content = content_of_file(plan, verified)
    account = account_of(content.title, plan.blocks, plan.schedule, fitting.table, plan.static)
    other = plan.predicted.peak_bytes - account.peak_bytes
    less = "more" if other >= 0 else "less"
    beside = (
        f"Of the blocks alone: with the model's own code around them the whole step takes "
        f"{format_size(abs(other))} {less} at its peak."
    )
    found = [] if points is None else [fit.predicted for fit in sampled_frontier(fitting, points)]
    return with_account(content, account, beside, found)
