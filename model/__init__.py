"""AlphaFold 2's Evoformer, written so that every submodule can be run in pieces.

Names are imported on first use, so that what needs no torch does not load it.
"""

from importlib import import_module
from typing import Any

from evoplan.model.config import InputShape
from evoplan.model.families import PRESETS, EvoformerConfig, TrunkConfig, preset

_LAZY = {
    "EvoformerBlock": "evoplan.model.modules.evoformer",
    "EvoformerStack": "evoplan.model.modules.evoformer",
    "EvoformerTrunk": "evoplan.model.modules.trunk",
    "Chain": "evoplan.model.running.chain",
    "Step": "evoplan.model.running.chain",
}

__all__ = ["PRESETS", "EvoformerConfig", "InputShape", "TrunkConfig", "preset", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
