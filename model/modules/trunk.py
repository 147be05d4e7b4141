"""The extra MSA stack followed by the main stack, as one chain over the state (e, m, z)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from evoplan.model.families import TrunkConfig
from evoplan.model.modules.evoformer import EvoformerStack, mask_constants
from evoplan.model.running.chain import Plannable, State, laid_out

# What the extra stack's blocks call m, its mask and its pair counts.
EXTRA_NAMES = {"m": "e", "msa_mask": "extra_mask", "pair_count": "extra_count"}


class EvoformerTrunk(Plannable):
    """The extra stack rewrites (e, z), then the main stack (m, z).

    Inputs: e [*, s_e, r, c_e], m [*, s, r, c_m], z [*, r, r, c_z], and masks without channels, extra_mask,
    msa_mask and pair_mask (1 where there is data; all ones when not given). Returns the new (m, z): nobody
    reads e after the extra stack.

    Source: Jumper et al. (2021), Suppl. Alg. 2, lines 15-17.
    """

    config: TrunkConfig
    outputs = ("m", "z")

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = TrunkConfig.checked(config)
        self.extra = EvoformerStack(config.extra)
        self.main = EvoformerStack(config.main)

    def stacks(self) -> Iterator[tuple[str, nn.ModuleList, dict[str, str]]]:
        """The blocks of both stacks."""
        yield "extra.blocks", self.extra.blocks, EXTRA_NAMES
        yield "main.blocks", self.main.blocks, {}

    def prepare(
        self,
        e: Tensor,
        m: Tensor,
        z: Tensor,
        extra_mask: Tensor | None = None,
        msa_mask: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> tuple[State, dict[str, Tensor]]:
        """The state and the constants of its chain."""
        constants = mask_constants(m, z, msa_mask, pair_mask)
        extra = mask_constants(e, z, extra_mask, constants["pair_mask"])
        constants |= {EXTRA_NAMES[name]: extra[name] for name in ("msa_mask", "pair_count")}
        return laid_out(e=e, m=m, z=z), constants
