"""AlphaFold 2's Evoformer: the main stack, and the extra MSA stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from evoplan.model.config import Dims, Family, InputShape, ModelConfig, Preset

ColumnAttention = Literal["gated", "global"]
MSA: Dims = ("batch", "seq", "res", "c_m")
PAIR: Dims = ("batch", "row", "column", "c_z")


@dataclass(frozen=True)
class EvoformerConfig(ModelConfig):
    """Widths of an Evoformer stack; the defaults are AlphaFold 2's main stack.

    Its columns attend gated (Alg. 8); those of the extra MSA stack attend globally (Alg. 19).

    Attributes:
        n_block: blocks.
        c_m, c_z: channels of m [*, s, r, c_m] and z [*, r, r, c_z].
        n_head_msa, n_head_pair: heads of attention on m and on z.
        c_head_msa, c_head: width of one head on m and on z.
        c_opm, c_tri: hidden channels of the outer product mean and of triangle multiplications.
        transition_factor: how many times a transition widens.
        dropout_msa, dropout_pair: rates, from 0 to below 1.
        column_attention: gated or global.

    Raises:
        ValueError: a width is no whole number of at least 1, or a rate is out of range.

    Source: Jumper et al. (2021), Suppl. Alg. 6-15, 18, 19 and 1.6.
    """

    state: ClassVar = {"m": MSA, "z": PAIR}
    masks: ClassVar = {"msa_mask": "m", "pair_mask": "z"}
    gated: ClassVar = True  # attention; its triangles are biased

    n_block: int = 48
    c_m: int = 256
    c_z: int = 128
    n_head_msa: int = 8
    n_head_pair: int = 4
    c_head: int = 32  # width of one attention head on z
    c_opm: int = 32  # outer product mean
    c_tri: int = 128  # triangle multiplication
    transition_factor: int = 4
    dropout_msa: float = 0.15
    dropout_pair: float = 0.25
    c_head_msa: int = 32  # width of one attention head on m
    column_attention: ColumnAttention = "gated"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.column_attention not in get_args(ColumnAttention):
            choices = " or ".join(map(repr, get_args(ColumnAttention)))
            raise ValueError(f"column_attention must be {choices}, not {self.column_attention!r}")

    @property
    def widest(self) -> int:
        """Channels of the widest tensor that a step makes of a position."""
        heads = max(self.n_head_msa * self.c_head_msa, self.n_head_pair * self.c_head)
        return max(heads, self.transition_factor * self.channels, self.c_opm**2, self.c_tri)


EXTRA = EvoformerConfig(n_block=4, c_m=64, c_head_msa=8, column_attention="global")

EVOFORMER = Family(
    "evoformer",
    EvoformerConfig,
    stack="evoplan.model.modules.evoformer:EvoformerStack",
    program="evoplan.model.programs.masked_msa:MaskedMSAModel",
    presets={
        "alphafold2": Preset(
            EvoformerConfig(), InputShape(128, 256), "main stack, initial training crop (Suppl. 1.11)"
        ),
        "alphafold2-finetune": Preset(
            EvoformerConfig(), InputShape(512, 384), "main stack, fine-tuning crop (Suppl. 1.11)"
        ),
        "alphafold2-t1044": Preset(
            EvoformerConfig(),
            InputShape(128, 2048),
            "main stack, inference on a protein as long as CASP14's T1044",
        ),
        "alphafold2-extra": Preset(
            EXTRA, InputShape(1024, 256), "extra MSA stack, initial training crop (Suppl. Alg. 18, 1.11)"
        ),
        "alphafold2-extra-finetune": Preset(
            EXTRA, InputShape(5120, 384), "extra MSA stack, fine-tuning crop (Suppl. Alg. 18, 1.11)"
        ),
        "alphafold2-narrow": Preset(
            EvoformerConfig(n_block=4, c_m=64, c_z=64),
            InputShape(32, 64),
            "4 blocks, c_m = c_z = 64, AlphaFold 2's heads and widths; trains on a laptop",
        ),
    },
)
