"""Whether a plan's schedule and figures are its problem's: a plan file may have been made by anybody."""

from __future__ import annotations

from math import prod

from evoplan.cost_model.devices import DTYPES
from evoplan.cost_model.static import static_bytes
from evoplan.model.running.chain import Chain, Step
from evoplan.model.running.kernels import kernel
from evoplan.model.running.strategy import COMPILED, Strategy
from evoplan.model.sharing.parallel import ParallelEvoformer
from evoplan.planner.checking.predictions import check_predicted
from evoplan.planner.plans.plan import Plan, load_plan
from evoplan.planner.plans.sealed import PlanFileError
from evoplan.planner.problems.costing import device_of, input_shapes, planned_model
from evoplan.planner.problems.digest import model_digest
from evoplan.planner.schedules.schedule import strategies_used


def load_consistent(path: str) -> Plan:
    """Read a plan file, check it, and hold it against the model that it is for and a replay of its schedule.

    Raises:
        PlanFileError: it cannot be used; one line that names it.
    """
    plan = load_plan(path)
    try:
        check_consistent(plan)
        check_predicted(plan)
    except ValueError as error:
        raise PlanFileError(f"{path}: {error}") from None
    return plan


def check_consistent(plan: Plan) -> None:
    """Refuse a schedule that the model cannot run, and memory that is not the model's.

    Raises:
        ValueError: says what is wrong, and what to do.
    """
    problem = plan.problem
    device = device_of(problem)
    model = planned_model(problem)
    steps = Chain.of(model).steps
    covered = len(plan.schedule.span)
    if covered != len(steps):
        raise ValueError(f"schedule: it has {covered} steps, the model {len(steps)}; make it again")
    state = problem.state_shapes()
    for index, strategies in strategies_used(plan.schedule).items():
        for strategy in strategies:
            try:
                _check_strategy(steps[index], strategy, state)
            except ValueError as error:
                raise ValueError(f"schedule: {steps[index].name}: {error}; make it again") from None
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    shapes = input_shapes(problem, model)
    counted = () if problem.donate else state
    least = sum(prod(shapes[name]) for name in counted) * DTYPES[problem.dtype]
    expected = static_bytes(sizes, 0, 0, problem.dtype, device, problem.optimizer, problem.training)
    for name in ("parameters", "gradients", "optimizer"):
        if plan.static[name] != expected[name]:
            raise ValueError(f"static.{name} is not that of its model; make it again")
    if plan.static["inputs"] < least and not problem.given:
        raise ValueError("static.inputs is less than its shapes take; make it again")
    whole = model.stack if isinstance(model, ParallelEvoformer) else model
    if plan.model_digest is not None and plan.model_digest != model_digest(whole):
        raise ValueError(
            "its figures are for a model that is built otherwise than its configuration says; make it again, "
            "or use it from Python with that model"
        )


def _check_strategy(step: Step, strategy: Strategy, state: dict[str, tuple[int, ...]]) -> None:
    """Refuse what a step cannot run under; ranks' shares are shorter, which the run itself checks."""
    if strategy.kernel != COMPILED:
        kernel(strategy.kernel)
    strategy.way.check(step.submodule, strategy, state[step.target])
