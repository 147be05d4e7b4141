"""Plans of models that were written elsewhere: made, or read and held against the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import isclose
from typing import Any

import torch
from torch import nn

from evoplan.model.foreign.capture import CaptureError
from evoplan.model.foreign.knobs import Knobs
from evoplan.planner.fitting.plan import FitPlan
from evoplan.planner.fitting.problem import Fitting, Timing, fitting_of
from evoplan.planner.fitting.simulating import Loss, mean_of_squares
from evoplan.planner.fitting.solving import baselines, fastest, least_fit
from evoplan.planner.plans.plan import SolverReport
from evoplan.planner.plans.planning import NoPlanError
from evoplan.planner.problems.costing import torch_version
from evoplan.planner.schedules.schedule import strategies_used
from evoplan.planner.sizes import exact_size, format_seconds, parse_size


def fitting_for(
    plan: FitPlan,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Loss | None,
    knobs: Knobs | None = None,
) -> tuple[Fitting, FitPlan]:
    """The costs of a plan that was made before, of the model that it is for.

    Raises:
        CaptureError: it is for another model, or other inputs; says which.
    """
    dtype, _, mixed = plan.precision.partition(" ")
    where = {parameter.device.type for parameter in model.parameters()}
    named = plan.own_device or (None if plan.device in where else plan.device)
    about = loss or mean_of_squares, plan.optimizer, getattr(torch, dtype) if mixed else None, named, knobs
    timing: Timing = "roofline" if plan.costs["time"] == "roofline" else "predicted"
    fitting = fitting_of(model, args, kwargs, *about, timing, plan.strategies)
    return fitting, made_before(fitting, plan, plan.budget_bytes)


def made_before(fitting: Fitting, known: FitPlan, size: int | None) -> FitPlan:
    """A plan, if it is for this model and what it is called with, and its figures are right for it."""
    if known.chain_digest != fitting.captured.digest:
        raise CaptureError(
            f"the plan is for a {known.model} whose {len(known.blocks)} blocks are called otherwise; "
            "fit this model and these inputs anew"
        )
    for name, there, here in (
        ("blocks are", ", ".join(known.blocks), ", ".join(fitting.blocks)),
        ("precision is", known.precision, fitting.said_precision),
        ("optimizer is", known.optimizer, fitting.optimizer),
    ):
        if there != here:
            raise CaptureError(f"the plan's {name} {there:.60}, here {here:.60}; fit anew")
    for step, used in strategies_used(known.schedule).items():
        offered = {cost.strategy for cost in fitting.table.options[step]}
        for strategy in used - offered:
            knobs = ", ".join(f"{name}={value}" for name, value in strategy.knobs)
            instead = f"give `knobs` that have {knobs}, or fit anew" if knobs else "fit anew"
            raise CaptureError(f"{known.blocks[step]} cannot be run {strategy} here; {instead}")
    predicted = fitting.predict(known.schedule)
    if predicted.peak_bytes != known.predicted.peak_bytes:
        raise CaptureError(
            f"the plan's peak is {exact_size(known.predicted.peak_bytes)}, that of this model, loss, "
            f"optimizer and device {exact_size(predicted.peak_bytes)}; fit anew"
        )
    if known.static != fitting.static:
        raise CaptureError("the plan's static bytes are not those of this model and optimizer; fit anew")
    says, found = known.predicted.step_seconds, predicted.step_seconds
    # Of a roofline: measured times, and those calibrated on this machine, may be others now.
    if known.costs["time"] == fitting.times == "roofline" and not isclose(says, found, rel_tol=1e-9):
        raise CaptureError(
            f"the plan's step takes {format_seconds(says)}, that of this model and loss "
            f"{format_seconds(found)}; fit anew"
        )
    if size is not None and predicted.peak_bytes > size:
        needs = exact_size(predicted.peak_bytes)
        raise NoPlanError(f"the plan needs {needs}, the budget is {exact_size(size)}; fit anew", size)
    return known


def bytes_of(budget: str | int | None) -> int | None:
    """A budget as `fit` takes it; ValueError where it is none."""
    return None if budget is None else parse_size(budget)


def planned(fitting: Fitting, budget: int | None) -> FitPlan:
    """The fastest plan within a budget; None is unlimited.

    Raises:
        NoPlanError: nothing fits; says the least that does.
    """
    begun = time.perf_counter()
    found = fastest(fitting, budget)
    seconds = time.perf_counter() - begun
    loss = fitting.loss
    return FitPlan(
        model=type(fitting.model).__name__,
        chain_digest=fitting.captured.digest,
        blocks=fitting.blocks,
        device=fitting.device.name,
        own_device=fitting.own_device,
        precision=fitting.said_precision,
        optimizer=fitting.optimizer,
        loss=getattr(loss, "__qualname__", type(loss).__qualname__),
        budget_bytes=budget,
        costs={"memory": "traced", "time": fitting.times, "torch": torch_version()},
        solver=SolverReport(name="dp", seconds=seconds),
        predicted=found.predicted,
        static=fitting.static,
        baselines=baselines(fitting),
        least_feasible_bytes=least_fit(fitting).predicted.peak_bytes,
        notes=fitting.captured.notes,
        schedule=found.schedule,
    )
