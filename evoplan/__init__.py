"""evoplan: the fastest way to run an Evoformer, or any model, within a memory budget.

The packages inside are the project's top-level folders. Names are imported on first use, so that
`import evoplan` and the command line answer before torch is loaded.
"""

import os
from importlib import import_module
from typing import Any

# Before torch is loaded: its profiler, which measures peaks, else writes two lines for each run.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

_LAZY = {
    "fit": "evoplan.planner.fitting.fitted",
    "LightningFit": "evoplan.planner.fitting.lightning_callback",
    "TransformersFit": "evoplan.planner.fitting.transformers_callback",
    "inspect": "evoplan.planner.fitting.inspecting",
    "Fitted": "evoplan.planner.fitting.fitted",
    "FitPlan": "evoplan.planner.fitting.plan",
    "CaptureError": "evoplan.model.foreign.capture",
    "ChangedCallError": "evoplan.model.foreign.calls",
    "make_plan": "evoplan.planner.plans.making",
    "NoPlanError": "evoplan.planner.plans.planning",
    "apply_plan": "evoplan.planner.execution.applying",
    "verify_plan": "evoplan.planner.checking.verify",
    "simulate_plan": "evoplan.planner.checking.verify",
    "Plan": "evoplan.planner.plans.plan",
    "load_plan": "evoplan.planner.plans.plan",
    "EvoformerConfig": "evoplan.model.families",
    "TrunkConfig": "evoplan.model.families",
    "PairformerConfig": "evoplan.model.families",
    "MSAModuleConfig": "evoplan.model.families",
    "TinyOpenFoldConfig": "evoplan.model.families",
    "InputShape": "evoplan.model.config",
    "EvoformerStack": "evoplan.model.modules.evoformer",
    "EvoformerTrunk": "evoplan.model.modules.trunk",
    "PairformerStack": "evoplan.model.modules.pairformer",
    "MSAModuleStack": "evoplan.model.modules.pairformer",
    "TinyOpenFoldStack": "evoplan.model.modules.tiny_openfold",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'evoplan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
