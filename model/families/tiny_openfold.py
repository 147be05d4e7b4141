"""TinyOpenFold: a small Evoformer that is trained on distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from evoplan.model.config import Family, InputShape, ModelConfig, Preset
from evoplan.model.families.evoformer import MSA, PAIR

# What TinyOpenFold is trained on (`model.programs.tiny_data`).
Task = Literal["random", "distance"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class TinyOpenFoldConfig(ModelConfig):
    """Widths of TinyOpenFold; the defaults are the original's, with 2,653,760 parameters.

    Its heads share the width of their stream, and it drops nothing.

    Attributes:
        n_block: blocks.
        c_m, c_z: channels of m [*, s, r, c_m] and z [*, r, r, c_z].
        n_head_msa, n_head_pair: heads of attention on m and on z.
        c_opm: hidden channels of the outer product mean.
        transition_factor: how many times a transition widens.
        n_token: tokens of the alignment.
        c_pair_features: features of a pair.

    Raises:
        ValueError: a width is no whole number of at least 1, or no multiple of its heads.

    Source: AMD's HPCTrainingExamples, TinyOpenFold, version 1.
    """

    state: ClassVar = {"m": MSA, "z": PAIR}
    masks: ClassVar = {}
    ranks: ClassVar = False
    gated: ClassVar = False
    column_attention: ClassVar = "plain"

    n_block: int = 4
    c_m: int = 64
    c_z: int = 128
    n_head_msa: int = 4
    n_head_pair: int = 4
    c_opm: int = 32
    transition_factor: int = 4
    n_token: int = 21  # 20 amino acids, and unknown
    c_pair_features: int = 65

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, c, heads in (("c_m", self.c_m, self.n_head_msa), ("c_z", self.c_z, self.n_head_pair)):
            if c % heads:
                raise ValueError(f"{what} = {c} is no multiple of its {heads} heads; choose one that is")

    @property
    def c_head_msa(self) -> int:
        """Width of one head on m."""
        return self.c_m // self.n_head_msa

    @property
    def c_head(self) -> int:
        """Width of one head on z."""
        return self.c_z // self.n_head_pair

    @property
    def c_tri(self) -> int:
        """Width of the triangle products' operands."""
        return self.c_z

    @property
    def widest(self) -> int:
        """Channels of the widest tensor that a step makes of a position."""
        return max(self.transition_factor * self.channels, self.c_opm**2)


TINY_OPENFOLD = Family(
    "tiny-openfold",
    TinyOpenFoldConfig,
    stack="evoplan.model.modules.tiny_openfold:TinyOpenFoldStack",
    presets={
        "tiny-openfold": Preset(
            TinyOpenFoldConfig(), InputShape(16, 64, batch=4), "the stack of TinyOpenFold at its defaults"
        )
    },
    instead="`python -m evoplan.experiments.tiny_openfold --plan FILE`",
)
