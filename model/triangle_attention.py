"""Triangle self-attention; which node the triangles start from is a parameter."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from evoplan.model.attention import Attention, transposed
from evoplan.model.config import EvoformerConfig
from evoplan.model.layers import FULL, rows
from evoplan.model.remake import cheap
from evoplan.model.submodule import IndependentAxis, ReductionAxis, Submodule


class TriangleAttention(Submodule):
    """Attention along rows of z (starting node) or along its columns (ending node).

    The ending node is the starting node on the transposed pair representation.

    Source: Jumper et al. (2021), Suppl. Alg. 13 and 14; row- and column-wise dropout, Alg. 6.
    """

    target = "z"
    context_inputs = ("z",)
    piece_inputs = ("z", "pair_mask")
    context_dim = -2
    attends = True

    def __init__(self, config: EvoformerConfig, node: Literal["starting", "ending"]) -> None:
        super().__init__()
        self.starting = node == "starting"
        self.norms = nn.ModuleDict({"z": nn.LayerNorm(config.c_z)})
        self.linear_b = nn.Linear(config.c_z, config.n_head_pair, bias=False)
        self.attention = Attention(config.c_z, config.n_head_pair, config.c_head)
        self.dropout = config.dropout_pair
        dim, name = (-3, "row") if self.starting else (-2, "column")
        self.dropout_shared_dim = dim
        self.context_cuts = {"z": dim}
        self.axes = (
            IndependentAxis(name, {"z": dim, "pair_mask": dim + 1}),
            ReductionAxis("head", config.n_head_pair),
        )

    def context(self, z: Tensor, part: slice = FULL) -> Tensor:
        of_rows = z if self.starting else z.transpose(-3, -2)
        return rows(self.linear_b, of_rows, part).movedim(-1, -3)  # [*, heads, r, r]

    def piece(self, z: Tensor, pair_mask: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        if self.starting:
            return self.attention(z, pair_mask, context, part)
        update = self.attention(cheap(transposed, z), pair_mask.transpose(-1, -2), context, part)
        return transposed(update)
