"""Triangle self-attention; which node the triangles start from is a parameter."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from evoplan.model.families import EvoformerConfig, MSAModuleConfig, PairformerConfig
from evoplan.model.modules.attention import Attention, transposed
from evoplan.model.modules.representations import ALPHAFOLD
from evoplan.model.running.layers import FULL, rows
from evoplan.model.running.remake import cheap
from evoplan.model.running.submodule import ReductionAxis, Submodule
from evoplan.model.running.unread import affine_at_the_end


class TriangleAttention(Submodule):
    """Attention along rows of z (starting node) or along its columns (ending node).

    The ending node is the starting node on the transposed pair representation.

    Args:
        bias: of gate and output, as AlphaFold 2 has it.
        transposed_bias: for the ending node, the bias of query i and key k is made of z_ki, as AlphaFold 2
            has it; else of z_ik, as AlphaFold 3's code has it, unlike its Alg. 15.

    Source: Jumper et al. (2021), Suppl. Alg. 13 and 14; row- and column-wise dropout, Alg. 6. Without biases
    Abramson et al. (2024), Suppl. Alg. 14 and 15.
    """

    layout = ALPHAFOLD
    target = "z"
    context_inputs = ("z",)
    piece_inputs = ("z", "pair_mask")
    attends = True

    def __init__(
        self,
        config: EvoformerConfig | PairformerConfig | MSAModuleConfig,
        node: Literal["starting", "ending"],
        bias: bool = True,
        transposed_bias: bool = True,
    ) -> None:
        super().__init__()
        self.starting = node == "starting"
        self.norms = nn.ModuleDict({"z": nn.LayerNorm(config.c_z)})
        self.linear_b = nn.Linear(config.c_z, config.n_head_pair, bias=False)
        self.attention = Attention(config.c_z, config.n_head_pair, config.c_head, bias=bias)
        self.dropout = config.dropout_pair
        axis = "row" if self.starting else "column"
        self.transposes = transposed_bias and not self.starting
        self.context_dims = ("head", "column", "row") if self.transposes else ("head", "row", "column")
        self.dropout_shared, self.context_axis = axis, (axis,)
        self.axes = (self.along(axis), ReductionAxis("head", config.n_head_pair))

    def context(self, z: Tensor, part: slice = FULL) -> Tensor:
        queries = z.transpose(-3, -2) if self.transposes else z
        return rows(self.linear_b, queries, part).movedim(-1, -3)  # [*, heads, r, r]

    @affine_at_the_end
    def piece(self, z: Tensor, pair_mask: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        update: Tensor
        if self.starting:
            update = self.attention(z, pair_mask, context, part)
            return update
        update = self.attention(cheap(transposed, z), pair_mask.transpose(-1, -2), context, part)
        return transposed(update)
