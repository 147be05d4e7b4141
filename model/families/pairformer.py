"""AlphaFold 3's trunk on tokens: the Pairformer, and the MSA module before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from evoplan.model.config import Family, InputShape, ModelConfig, Preset
from evoplan.model.families.evoformer import MSA, PAIR


@dataclass(frozen=True)
class PairformerConfig(ModelConfig):
    """Widths of a Pairformer stack; the defaults are AlphaFold 3's.

    Attributes:
        n_block: blocks.
        c_s, c_z: channels of s [*, r, c_s] and z [*, r, r, c_z].
        n_head_single, n_head_pair: heads of attention on s and on z.
        c_head_single, c_head: width of one head on s and on z.
        c_tri: hidden channels of triangle multiplications.
        transition_factor: how many times a transition widens.
        dropout_pair: rate, from 0 to below 1.

    Raises:
        ValueError: a width is no whole number of at least 1, or a rate is out of range.

    Source: Abramson et al. (2024), Suppl. Alg. 11-17, 24.
    """

    state: ClassVar = {"s": ("batch", "res", "c_s"), "z": PAIR}
    masks: ClassVar = {"single_mask": "s", "pair_mask": "z"}

    n_block: int = 48
    c_s: int = 384
    c_z: int = 128
    n_head_single: int = 16
    c_head_single: int = 24
    n_head_pair: int = 4
    c_head: int = 32  # width of one attention head on z
    c_tri: int = 128  # triangle multiplication
    transition_factor: int = 4
    dropout_pair: float = 0.25

    @property
    def widest(self) -> int:
        """Channels of the widest tensor that a step makes of a position."""
        heads = max(self.n_head_single * self.c_head_single, self.n_head_pair * self.c_head)
        return max(heads, self.transition_factor * self.channels, self.c_tri)


@dataclass(frozen=True)
class MSAModuleConfig(ModelConfig):
    """Widths of an MSA module; the defaults are AlphaFold 3's.

    Nobody reads the last block's m, so that it is not made, unless `last_m` wants it.

    Attributes:
        n_block: blocks.
        c_m, c_z: channels of m [*, s, r, c_m] and z [*, r, r, c_z].
        n_head_msa, n_head_pair: heads of the weighted averaging of m and of attention on z.
        c_head_msa, c_head: width of one head of each.
        c_opm, c_tri: hidden channels of the outer product mean and of triangle multiplications.
        transition_factor: how many times a transition widens.
        dropout_msa, dropout_pair: rates, from 0 to below 1.
        last_m: whether the last block makes m.

    Raises:
        ValueError: a width is no whole number of at least 1, or a rate is out of range.

    Source: Abramson et al. (2024), Suppl. Alg. 8-15; the width of a head as in AlphaFold 3's code.
    """

    state: ClassVar = {"m": MSA, "z": PAIR}
    masks: ClassVar = {"msa_mask": "m", "pair_mask": "z"}

    n_block: int = 4
    c_m: int = 64
    c_z: int = 128
    n_head_msa: int = 8
    c_head_msa: int = 8  # width of one head of the weighted averaging
    n_head_pair: int = 4
    c_head: int = 32  # width of one attention head on z
    c_opm: int = 32  # outer product mean
    c_tri: int = 128  # triangle multiplication
    transition_factor: int = 4
    dropout_msa: float = 0.15
    dropout_pair: float = 0.25
    last_m: bool = False

    @property
    def widest(self) -> int:
        """Channels of the widest tensor that a step makes of a position."""
        heads = max(self.n_head_msa * self.c_head_msa, self.n_head_pair * self.c_head)
        return max(heads, self.transition_factor * self.channels, self.c_opm**2, self.c_tri)

    def with_blocks(self, n_block: int) -> MSAModuleConfig:
        """The module's first blocks, after which others would read m."""
        return replace(self, n_block=n_block, last_m=self.last_m or n_block < self.n_block)


_TOKENS = {"": 384, "-640": 640, "-768": 768}
_SAYS = "crop of {} tokens (Suppl. 5.2)"

PAIRFORMER = Family(
    "pairformer",
    PairformerConfig,
    stack="evoplan.model.modules.pairformer:PairformerStack",
    program="evoplan.model.programs.masked_residues:MaskedResidueModel",
    presets={
        f"pairformer-48{suffix}": Preset(
            PairformerConfig(), InputShape(n_res=tokens), f"AlphaFold 3's Pairformer, {_SAYS.format(tokens)}"
        )
        for suffix, tokens in _TOKENS.items()
    },
)

MSA_MODULE = Family(
    "msa-module",
    MSAModuleConfig,
    stack="evoplan.model.modules.pairformer:MSAModuleStack",
    program="evoplan.model.programs.masked_residues:MSAModuleModel",
    presets={
        f"msa-module-4{suffix}": Preset(
            MSAModuleConfig(),
            InputShape(1024, tokens),
            f"AlphaFold 3's MSA module, {_SAYS.format(tokens)}",
        )
        for suffix, tokens in _TOKENS.items()
    },
)
