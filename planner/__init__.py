"""Plans: the fastest way to run a chain of steps within a memory budget.

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from importlib import import_module
from typing import Any

_LAZY = {
    "Plan": "evoplan.planner.plans.plan",
    "load_plan": "evoplan.planner.plans.plan",
    "make_plan": "evoplan.planner.plans.making",
    "NoPlanError": "evoplan.planner.plans.planning",
    "apply_plan": "evoplan.planner.execution.applying",
    "verify_plan": "evoplan.planner.checking.verify",
    "simulate_plan": "evoplan.planner.checking.verify",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'planner' has no attribute {name!r}")
