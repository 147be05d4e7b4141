"""The families of models that evoplan knows, one file each, and their presets. Free of torch.

A family registers once: everything else asks here what there is, how it is built, what `run` feeds it with.
"""

from __future__ import annotations

from evoplan.model.config import Family, ModelConfig, Preset
from evoplan.model.families.evoformer import EVOFORMER, EvoformerConfig
from evoplan.model.families.pairformer import MSA_MODULE, PAIRFORMER, MSAModuleConfig, PairformerConfig
from evoplan.model.families.tiny_openfold import TINY_OPENFOLD, TinyOpenFoldConfig
from evoplan.model.families.trunk import TRUNK, TrunkConfig

__all__ = [
    "FAMILIES", "PRESETS", "EvoformerConfig", "MSAModuleConfig", "PairformerConfig", "TinyOpenFoldConfig",
    "TrunkConfig", "family_of", "preset", "register",
]  # fmt: skip

FAMILIES: dict[str, Family] = {}  # by name
PRESETS: dict[str, Preset] = {}


def register(family: Family) -> None:
    """Make a family and its presets known.

    Raises:
        ValueError: there is one of that name, or a preset of one of those names.
    """
    taken = [name for name in family.presets if name in PRESETS]
    if family.name in FAMILIES or taken:
        raise ValueError(f"{(taken or [family.name])[0]} is registered already; choose another name")
    FAMILIES[family.name] = family
    PRESETS.update(family.presets)


for _family in (EVOFORMER, TRUNK, PAIRFORMER, MSA_MODULE, TINY_OPENFOLD):
    register(_family)


def family_of(config: ModelConfig) -> Family:
    """The family that a configuration is of; ValueError where none is registered."""
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    raise ValueError(f"no family has {type(config).__name__}; register one with model.families.register")


def preset(name: str) -> Preset:
    """Look a preset up; raises ValueError that lists the names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown model {name!r}; choose one of: {', '.join(PRESETS)}") from None
