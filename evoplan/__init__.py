"""evoplan: the fastest way to run an Evoformer within a memory budget.

The packages inside are the project's top-level folders. Names are imported on first use, so that
`import evoplan` and the command line answer before torch is loaded.
"""

from importlib import import_module
from typing import Any

_LAZY = {
    "make_plan": "evoplan.planner.planning",
    "NoPlanError": "evoplan.planner.planning",
    "apply_plan": "evoplan.planner.applying",
    "verify_plan": "evoplan.planner.verify",
    "simulate_plan": "evoplan.planner.verify",
    "Plan": "evoplan.planner.plan",
    "load_plan": "evoplan.planner.plan",
    "EvoformerConfig": "evoplan.model.families",
    "TrunkConfig": "evoplan.model.families",
    "PairformerConfig": "evoplan.model.families",
    "MSAModuleConfig": "evoplan.model.families",
    "TinyOpenFoldConfig": "evoplan.model.families",
    "InputShape": "evoplan.model.config",
    "EvoformerStack": "evoplan.model.evoformer",
    "EvoformerTrunk": "evoplan.model.trunk",
    "PairformerStack": "evoplan.model.pairformer",
    "MSAModuleStack": "evoplan.model.pairformer",
    "TinyOpenFoldStack": "evoplan.model.tiny_openfold",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'evoplan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
