"""Certificates of plans of models that were written elsewhere.

A budget there is for the whole step, and a bound is for its blocks: they have the room that the code around
them leaves under the plan. The claim is on schedules whose blocks keep to that room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evoplan.planner.fitting.plan import FitPlan
from evoplan.planner.fitting.problem import Fitting
from evoplan.planner.plans.certificate import certificate
from evoplan.planner.plans.certify import proven
from evoplan.planner.schedules.replay import replay

ROOM = "; in the room that the code around the blocks leaves them under this plan"


def room_bytes(fitting: Fitting, plan: FitPlan) -> int | None:
    """What the budget leaves for the blocks, what is around them being as under the plan; None: no limit."""
    if plan.budget_bytes is None:
        return None
    beside = plan.predicted.peak_bytes - replay(plan.schedule, fitting.table).peak_bytes
    return plan.budget_bytes - beside


def certified(fitting: Fitting, plan: FitPlan, progress: Callable[[str], None] = lambda _: None) -> FitPlan:
    """The plan with what can be proven of it."""
    planned = plan.predicted.step_seconds
    other = planned - replay(plan.schedule, fitting.table).seconds
    room = room_bytes(fitting, plan)
    report = proven(fitting.table, plan.schedule, room, plan.solver, other, planned, progress)
    return plan.model_copy(update={"solver": report})


def certificate_of_fit(fitting: Fitting, plan: FitPlan) -> dict[str, Any]:
    """A certificate that others can check."""
    room = room_bytes(fitting, plan)
    played = replay(plan.schedule, fitting.table)
    about = {
        "model": plan.model,
        "budget_bytes": plan.budget_bytes,
        "beside_the_chain_bytes": plan.predicted.peak_bytes - played.peak_bytes,
        "times": fitting.times,
        "plan": plan.identity["plan"],
    }
    budget = fitting.table.most_bytes if room is None else room
    return certificate(fitting.table, plan.schedule, budget, about, ROOM)
