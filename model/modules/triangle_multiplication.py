"""Triangle multiplicative updates; the direction of the edges is a parameter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from evoplan.model.families import EvoformerConfig, MSAModuleConfig, PairformerConfig
from evoplan.model.modules.representations import ALPHAFOLD
from evoplan.model.running.layers import FULL, rows
from evoplan.model.running.layout import channels_first, channels_last
from evoplan.model.running.remake import cheap
from evoplan.model.running.submodule import ReductionAxis, Submodule


class TriangleMultiplication(Submodule):
    """z_ij += gate * W LayerNorm(sum_k a_ik b_jk) (outgoing) or sum_k a_ki b_kj (incoming).

    One operand is the context: b for outgoing edges, whose pieces are rows i, and a for
    incoming edges, whose pieces are columns j. So a piece and its gate read the same slice of z.

    Args:
        bias: of all linear layers, as AlphaFold 2 has it.

    Source: Jumper et al. (2021), Suppl. Alg. 11 and 12; dropout, Alg. 6. Without biases Abramson et al.
    (2024), Suppl. Alg. 12 and 13.
    """

    layout = ALPHAFOLD
    target = "z"
    context_inputs = ("z", "pair_mask")
    piece_inputs = ("z", "pair_mask")
    finish_inputs = ("z",)
    finish_is_affine = False
    context_dims = ("channel", "row", "column")
    dropout_shared = "row"

    def __init__(
        self,
        config: EvoformerConfig | PairformerConfig | MSAModuleConfig,
        edges: Literal["outgoing", "incoming"],
        bias: bool = True,
    ) -> None:
        super().__init__()
        c = config.c_tri
        self.outgoing = edges == "outgoing"
        self.norms = nn.ModuleDict({"z": nn.LayerNorm(config.c_z)})
        self.linear_a = nn.Linear(config.c_z, c, bias=bias)
        self.linear_a_gate = nn.Linear(config.c_z, c, bias=bias)
        self.linear_b = nn.Linear(config.c_z, c, bias=bias)
        self.linear_b_gate = nn.Linear(config.c_z, c, bias=bias)
        self.norm_product = nn.LayerNorm(c)
        self.linear_out = nn.Linear(c, config.c_z, bias=bias)
        self.linear_gate = nn.Linear(config.c_z, config.c_z, bias=bias)
        self.dropout = config.dropout_pair
        axis = "row" if self.outgoing else "column"
        self.context_axis = (axis,)
        self.axes = (self.along(axis), ReductionAxis("channel", c, concatenate=True))

    def context(self, z: Tensor, pair_mask: Tensor, part: slice = FULL) -> Tensor:
        second = (self.linear_b, self.linear_b_gate) if self.outgoing else (self.linear_a, self.linear_a_gate)
        return _operand(z, pair_mask, *second, part)

    def piece(self, z: Tensor, pair_mask: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        if self.outgoing:
            a = _operand(z, pair_mask, self.linear_a, self.linear_a_gate, part)
            product = a @ context.transpose(-1, -2)  # a[c, i, k] b[c, j, k]
        else:
            b = _operand(z, pair_mask, self.linear_b, self.linear_b_gate, part)
            product = context.transpose(-1, -2) @ b  # a[c, k, i] b[c, k, j]
        return channels_last(product)  # [*, i, j, c]

    def finish(self, update: Tensor, z: Tensor) -> Tensor:
        update = self.linear_out(cheap(self.norm_product, update))
        return cheap(torch.sigmoid, self.linear_gate(z)) * update


def _operand(z: Tensor, mask: Tensor, linear: nn.Linear, gate_linear: nn.Linear, part: slice) -> Tensor:
    """[*, c, r, r]: one operand of the product, channels first as the product wants them."""
    gate = cheap(torch.sigmoid, rows(gate_linear, z, part))
    opening = cheap(torch.mul, gate, mask[..., None])
    del gate
    operand = cheap(torch.mul, opening, rows(linear, z, part))
    del opening
    return cheap(channels_first, operand)
