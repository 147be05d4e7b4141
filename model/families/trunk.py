"""AlphaFold 2's trunk: the extra MSA stack, then the main stack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from evoplan.model.config import Family, InputShape, ModelConfig, Preset, override
from evoplan.model.families.evoformer import EXTRA, MSA, PAIR, EvoformerConfig


@dataclass(frozen=True)
class TrunkConfig(ModelConfig):
    """An extra MSA stack on (e, z), then the main stack on (m, z).

    Attributes:
        extra, main: widths of each; they share z.

    Raises:
        ValueError: their c_z differ.

    Source: Jumper et al. (2021), Suppl. Alg. 2, lines 15-17.
    """

    state: ClassVar = {"e": ("batch", "extra", "res", "c_e"), "m": MSA, "z": PAIR}
    masks: ClassVar = {"extra_mask": "e", "msa_mask": "m", "pair_mask": "z"}

    extra: EvoformerConfig
    main: EvoformerConfig

    def __post_init__(self) -> None:
        for stack in (self.extra, self.main):
            EvoformerConfig.checked(stack)
        if self.extra.c_z != self.main.c_z:
            raise ValueError(
                f"the stacks share z, but c_z is {self.extra.c_z} in one, {self.main.c_z} in the other"
            )

    @property
    def n_block(self) -> int:
        """Blocks of both stacks."""
        return self.extra.n_block + self.main.n_block

    @property
    def c_e(self) -> int:
        """Channels of the extra MSA representation."""
        return self.extra.c_m

    @property
    def c_m(self) -> int:
        """Channels of the MSA representation."""
        return self.main.c_m

    @property
    def c_z(self) -> int:
        """Channels of the pair representation."""
        return self.main.c_z

    @property
    def widest(self) -> int:
        """Channels of the widest tensor that a step makes of a position."""
        return max(self.extra.widest, self.main.widest)

    def resized(self, **sizes: int | None) -> TrunkConfig:
        """The trunk with other sizes of its main stack; c_z is both's."""
        extra = override(self.extra, c_z=sizes.get("c_z"))
        return TrunkConfig(extra, self.main.resized(**sizes))

    def with_blocks(self, n_block: int) -> TrunkConfig:
        """The trunk's first blocks; the main stack keeps at least one."""
        left = n_block - self.extra.n_block
        if left < 1:
            least = self.extra.n_block + 1
            raise ValueError(f"{n_block} blocks: at least {least}, one of the main stack included")
        return replace(self, main=replace(self.main, n_block=left))

    def with_dropout(self, rate: float) -> TrunkConfig:
        """The same trunk with one dropout rate everywhere; 0 turns it off."""
        return TrunkConfig(self.extra.with_dropout(rate), self.main.with_dropout(rate))

    def without_rates(self) -> TrunkConfig:
        """The trunk with one rate wherever it drops."""
        return TrunkConfig(self.extra.without_rates(), self.main.without_rates())


TRUNK = Family(
    "trunk",
    TrunkConfig,
    stack="evoplan.model.modules.trunk:EvoformerTrunk",
    program="evoplan.model.programs.masked_msa:MaskedMSAModel",
    presets={
        "alphafold2-trunk": Preset(
            TrunkConfig(EXTRA, EvoformerConfig()),
            InputShape(128, 256, n_extra=1024),
            "extra MSA stack, then main stack, initial training crop (Suppl. Alg. 2, 1.11)",
        ),
        "alphafold2-trunk-finetune": Preset(
            TrunkConfig(EXTRA, EvoformerConfig()),
            InputShape(512, 384, n_extra=5120),
            "extra MSA stack, then main stack, fine-tuning crop (Suppl. Alg. 2, 1.11)",
        ),
    },
)
