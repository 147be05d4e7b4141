"""The submodules that rewrite the MSA representation."""

from __future__ import annotations

from torch import Tensor, nn

from model.attention import GatedAttention
from model.config import EvoformerConfig
from model.submodule import FULL, IndependentAxis, ReductionAxis, Submodule


class MSARowAttentionWithPairBias(Submodule):
    """Attention along each row of the alignment, biased by the pair representation.

    Source: Jumper et al. (2021), Suppl. Alg. 7; row-wise dropout, Suppl. 1.11.6.
    """

    target = "m"
    context_inputs = ("z",)
    piece_inputs = ("m", "msa_mask")
    context_cuts = {"z": -3}
    context_dim = -2  # rows of z are queries of the bias
    dropout_shared_dim = -3

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m), "z": nn.LayerNorm(config.c_z)})
        self.linear_b = nn.Linear(config.c_z, config.n_head_msa, bias=False)
        self.attention = GatedAttention(config.c_m, config.n_head_msa, config.c_head_msa)
        self.dropout = config.dropout_msa
        self.axes = (
            IndependentAxis("seq", {"m": -3, "msa_mask": -2}),
            ReductionAxis("head", config.n_head_msa),
        )

    def context(self, z: Tensor, part: slice = FULL) -> Tensor:
        bias = nn.functional.linear(z, self.linear_b.weight[part])
        return bias.movedim(-1, -3)  # [*, heads, r, r]

    def piece(self, m: Tensor, msa_mask: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        return self.attention(m, msa_mask, context, part)

    def finish(self, update: Tensor) -> Tensor:
        return update.add_(self.attention.linear_o.bias)


class MSAColumnAttention(Submodule):
    """Attention along each column of the alignment.

    Source: Jumper et al. (2021), Suppl. Alg. 8.
    """

    target = "m"
    piece_inputs = ("m", "msa_mask")

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m)})
        self.attention = GatedAttention(config.c_m, config.n_head_msa, config.c_head_msa)
        self.axes = (
            IndependentAxis("res", {"m": -2, "msa_mask": -1}),
            ReductionAxis("head", config.n_head_msa),
        )

    def piece(self, m: Tensor, msa_mask: Tensor, context: None = None, part: slice = FULL) -> Tensor:
        columns = m.transpose(-2, -3).contiguous()
        update = self.attention(columns, msa_mask.transpose(-1, -2), None, part)
        return update.transpose(-2, -3).contiguous()

    def finish(self, update: Tensor) -> Tensor:
        return update.add_(self.attention.linear_o.bias)
