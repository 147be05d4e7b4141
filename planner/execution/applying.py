"""From a plan and a model to the model under the plan."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial

from torch.distributed import ProcessGroup

from evoplan.model.running.chain import Plannable
from evoplan.model.sharing.parallel import ParallelEvoformer
from evoplan.model.sharing.ranks import Ranks
from evoplan.planner.arguments import check_choices, check_kinds
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.shapes import Fit, Fits, OtherShapes, Shapes
from evoplan.planner.plans.making import check_stack
from evoplan.planner.plans.plan import Plan, check_plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.digest import altered_names, model_digest
from evoplan.planner.problems.timing import Times, cost_with_times


def apply_plan(
    stack: Plannable,
    plan: Plan | Iterable[Plan],
    ranks: Ranks | ProcessGroup | None = None,
    other_shapes: OtherShapes = "refuse",
) -> PlannedModule:
    """The stack under a plan, or under several for inputs of different shapes: same parameters, same outputs.

    Args:
        stack: the model that the plan is for, with any weights; it is not changed.
        plan: as `make_plan` or `load_plan` returns it.
        ranks: that the plan's several ranks are, or their process group; each is then given its shards of
            the state and whole masks, and returns its shards of the results (see `ParallelEvoformer`).
        other_shapes: what to do with inputs of a shape that no plan is for. "refuse" says so; "clip" runs
            them under the nearest larger plan, in as many pieces as their axes allow; "pad" fills them up to
            that plan's shapes, masked, and crops the outputs, exact wherever masks are 1; "plan" plans for
            them under the same budget, which takes seconds, and keeps the plan.

    A plan with donated inputs takes the state that the model is called with: those tensors are empty as soon
    as it runs, and results may lie in their memory. One that cannot be taken is refused before any is: a view
    or a part of another tensor, one that requires a gradient, two inputs in one memory.

    Raises:
        ValueError: a plan is for another model, dtype or number of ranks.
    """
    check_stack(stack)
    plans = [plan] if isinstance(plan, Plan | str) or not isinstance(plan, Iterable) else list(plan)
    if not plans:
        raise ValueError("apply_plan needs at least one plan")
    check_choices(other_shapes=(other_shapes, OtherShapes))
    check_kinds(ranks=(ranks, Ranks | ProcessGroup | None, "what `Ranks(group)` is, or the process group"))
    for each in plans:
        check_plan(each)
        check_model(stack, each)
        if each.problem.donate != plans[0].problem.donate:
            raise ValueError("some plans have their inputs donated and some have not; give plans of one kind")
    if plans[0].problem.donate and other_shapes == "pad":
        raise ValueError("donated inputs are not padded, which copies them; use other_shapes='clip'")
    planned = _applied(stack, plans, ranks, other_shapes)
    planned.plans = tuple(plans)
    return planned


def _applied(
    stack: Plannable, plans: list[Plan], ranks: Ranks | ProcessGroup | None, other_shapes: OtherShapes
) -> PlannedModule:
    first = plans[0].problem
    if first.ranks == 1 and ranks is None:
        on_demand = partial(_planned_for, plans[0])
        return PlannedModule(stack, Fits(map(_fit, plans), other_shapes, on_demand), donated=first.donate)
    if ranks is None:
        raise ValueError(f"the plan is for {first.ranks} ranks; give their process group")
    if len(plans) > 1 or other_shapes != "refuse":
        raise ValueError("on several ranks a model has one plan, for one shape; give no other_shapes")
    shared = ParallelEvoformer(stack, ranks, first.shape, whole=False)
    if shared.ranks.size != first.ranks:
        raise ValueError(f"the plan is for {first.ranks} ranks, not {shared.ranks.size}; plan for those")
    fits = Fits([Fit(plans[0].schedule, shared.input_shapes)])
    return PlannedModule(shared, fits, donated=first.donate)


def check_model(stack: Plannable, plan: Plan) -> None:
    """See that a plan is for a model. One with layers that the plan does not know runs, with a warning.

    Raises:
        ValueError: it is for another.
    """
    config = getattr(stack, "config", None)
    if config is None or config.without_rates() != plan.problem.config.without_rates():
        raise ValueError(
            f"the plan is for {plan.problem.config}, the model has {config}; plan for this model"
        )
    dtype = next(stack.parameters()).dtype
    if str(dtype) != f"torch.{plan.problem.dtype}":
        raise ValueError(
            f"the plan is for {plan.problem.dtype}, the model is in {dtype}; plan for that dtype"
        )
    if plan.model_digest is None or plan.model_digest == model_digest(stack):
        return
    altered = altered_names(stack)
    if not altered:
        raise ValueError("the plan's figures are for a model that is built otherwise; plan for this model")
    more = f" and {len(altered) - 1} more" if len(altered) > 1 else ""
    warnings.warn(
        f"the plan does not know {altered[0]}{more}, so that its memory may be more; "
        "plan again for the model as it is",
        stacklevel=3,
    )


def _fit(plan: Plan) -> Fit:
    problem = plan.problem
    budget, reserve = problem.budget_bytes, plan.static.get("reserve", 0)
    slack = None if budget is None else budget - plan.predicted.peak_bytes + reserve
    return Fit(plan.schedule, problem.state_shapes(), plan.static["inputs"], slack)


def _planned_for(plan: Plan, model: Plannable, shapes: Shapes) -> Fit:
    """As `plan`, for inputs of other shapes.

    Raises:
        NoPlanError: its budget is too small for them.
        ValueError: the model takes no such inputs.
    """
    shape = plan.problem.config.input_shape(shapes)
    problem = plan.problem.model_copy(update={"shape": shape, "given": ()})
    kind = plan.costs["time"]
    times: Times = "auto" if kind == "measured" else "calibrated" if kind == "calibrated" else "roofline"
    return _fit(solve(cost_with_times(problem, times, stack=model), plan.solver.name))
