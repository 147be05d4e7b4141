"""Plans for what a peer takes."""

from __future__ import annotations

from dataclasses import replace

from evoplan.experiments.peers.registry import Setting
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import NoPlanError, solve


def plan_within(setting: Setting, budget_bytes: int, solver: str = "dp") -> Plan:
    """The plan for so many bytes above static.

    Raises:
        NoPlanError: nothing fits.
    """
    budget = {"budget_bytes": max(1, setting.static_bytes + budget_bytes)}
    return solve(replace(setting.costed, problem=setting.costed.problem.model_copy(update=budget)), solver)


def least_bytes(setting: Setting) -> int:
    """The least that has a plan, above static."""
    try:
        plan_within(setting, -setting.static_bytes + 1)
    except NoPlanError as error:
        return error.least_feasible_bytes - setting.static_bytes
    raise AssertionError("nothing fits one byte")
