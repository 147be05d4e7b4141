"""AlphaFold 2's Evoformer: one block, and the stack that a schedule is made for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evoplan.model.families import EvoformerConfig
from evoplan.model.modules.msa import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
)
from evoplan.model.modules.outer_product_mean import OuterProductMean, pair_count
from evoplan.model.modules.transition import Transition
from evoplan.model.modules.triangle_attention import TriangleAttention
from evoplan.model.modules.triangle_multiplication import TriangleMultiplication
from evoplan.model.running.chain import Block, Plannable, State, laid_out


class EvoformerBlock(Block):
    """Nine submodules, in the order of the paper.

    1,829,952 parameters at the widths of AlphaFold 2's main stack, 701,312 at those of its extra MSA stack.

    Source: Jumper et al. (2021), Suppl. Alg. 6 and, for global column attention, 18.
    """

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.row_attention = MSARowAttentionWithPairBias(config)
        column_attention = {"gated": MSAColumnAttention, "global": MSAColumnGlobalAttention}
        self.column_attention = column_attention[config.column_attention](config)
        self.msa_transition = Transition("m", config.c_m, config.transition_factor, "seq")
        self.outer_product_mean = OuterProductMean(config)
        self.triangle_outgoing = TriangleMultiplication(config, "outgoing")
        self.triangle_incoming = TriangleMultiplication(config, "incoming")
        self.triangle_starting = TriangleAttention(config, "starting")
        self.triangle_ending = TriangleAttention(config, "ending")
        self.pair_transition = Transition("z", config.c_z, config.transition_factor, "row")


class EvoformerStack(Plannable):
    """Blocks in sequence over the state (m, z).

    Inputs: m [*, s, r, c_m], z [*, r, r, c_z], and their masks, msa_mask [*, s, r] and pair_mask [*, r, r]
    (1 where there is data; all ones when not given). Returns the new (m, z).

    Source: Jumper et al. (2021), Suppl. Alg. 6 and 18.
    """

    config: EvoformerConfig
    outputs = ("m", "z")

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.config = EvoformerConfig.checked(config)
        self.blocks = nn.ModuleList(EvoformerBlock(config) for _ in range(config.n_block))
        initialise(self)

    def prepare(
        self, m: Tensor, z: Tensor, msa_mask: Tensor | None = None, pair_mask: Tensor | None = None
    ) -> tuple[State, dict[str, Tensor]]:
        """The state and the constants of its chain."""
        return laid_out(m=m, z=z), mask_constants(m, z, msa_mask, pair_mask)


@torch.no_grad()
def initialise(stack: nn.Module) -> None:
    """AlphaFold's initialisation: gates open, what enters the residual stream zero.

    Where a gate has no bias, as in AlphaFold 3, it is half open.

    Source: Jumper et al. (2021), Suppl. 1.11.4.
    """
    for name, module in stack.named_modules():
        if not isinstance(module, nn.Linear) or module.weight.is_meta:
            continue
        last = name.rpartition(".")[2]
        if last in ("linear_o", "linear_out", "linear_2") or last.endswith(("_gate", "_g")):
            nn.init.zeros_(module.weight)
        elif last.startswith("linear_1"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        else:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.constant_(module.bias, 1.0 if last.endswith(("_gate", "_g")) else 0.0)


def mask_for(name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of a representation's positions in its dtype; all ones where none is given."""
    if mask is None:
        return tensor.new_ones(tensor.shape[:-1])
    if mask.shape != tensor.shape[:-1]:
        raise ValueError(
            "masks must be shaped like their tensors without channels: "
            f"that of {name} {tuple(tensor.shape)} is {tuple(mask.shape)}"
        )
    return mask.to(tensor.dtype).contiguous()


def mask_constants(
    m: Tensor, z: Tensor, msa_mask: Tensor | None = None, pair_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What submodules read besides the state, by name: both masks and the outer product's counts."""
    msa_mask, pair_mask = mask_for("m", m, msa_mask), mask_for("z", z, pair_mask)
    if m.is_meta:  # nothing to count, and a product without data has torch load sympy
        count = msa_mask.new_empty((*m.shape[:-3], *z.shape[-3:-1]))
    else:
        with torch.autocast(m.device.type, enabled=False):  # half precision cannot count to 257, or to 2,049
            count = pair_count(msa_mask)
    return {"msa_mask": msa_mask, "pair_mask": pair_mask, "pair_count": count}
