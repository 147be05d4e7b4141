"""The only way from the MSA representation to the pair representation."""

from __future__ import annotations

from torch import Tensor, nn

from evoplan.model.families import EvoformerConfig, MSAModuleConfig
from evoplan.model.modules.representations import ALPHAFOLD
from evoplan.model.running.in_place import divide_over
from evoplan.model.running.layers import FULL, last_columns, rows, times
from evoplan.model.running.submodule import ReductionAxis, Submodule
from evoplan.model.running.unread import affine_at_the_end


def pair_count(msa_mask: Tensor) -> Tensor:
    """[*, r, r]: in how many sequences both residues are present, from msa_mask [*, s, r]."""
    return msa_mask.transpose(-1, -2) @ msa_mask


class OuterProductMean(Submodule):
    """z_ij += W mean_s (a_si outer b_sj) + b, over the sequences where both residues are present.

    Args:
        bias: of the two factors, as AlphaFold 2 has it.

    Source: Jumper et al. (2021), Suppl. Alg. 10; the mean over present sequences as in AlphaFold's code.
    Without biases Abramson et al. (2024), Suppl. Alg. 9.
    """

    layout = ALPHAFOLD
    target = "z"
    context_inputs = ("m", "msa_mask")
    piece_inputs = ("m", "msa_mask")
    finish_inputs = ("pair_count",)
    context_dims = ("seq", "res", "channel")
    context_axis = ("res",)
    eps = 1e-3

    def __init__(self, config: EvoformerConfig | MSAModuleConfig, bias: bool = True) -> None:
        super().__init__()
        c = config.c_opm
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m)})
        self.linear_a = nn.Linear(config.c_m, c, bias=bias)
        self.linear_b = nn.Linear(config.c_m, c, bias=bias)
        self.linear_out = nn.Linear(c * c, config.c_z)
        self.axes = (
            self.along("row", "res"),
            ReductionAxis("channel", c),  # of the left factor
        )

    def context(self, m: Tensor, msa_mask: Tensor, part: slice = FULL) -> Tensor:
        b: Tensor = self.linear_b(m)
        return b * msa_mask[..., None]  # [*, s, r, c], needed whole by every piece

    @affine_at_the_end
    def piece(self, m: Tensor, msa_mask: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        a = rows(self.linear_a, m, part) * msa_mask[..., None]
        c_a, c_b = a.shape[-1], context.shape[-1]
        left = a.flatten(-2).transpose(-1, -2)  # [*, i * c, s]
        right = context.flatten(-2)  # [*, s, j * c]
        outer = (left @ right).unflatten(-1, (-1, c_b)).unflatten(-3, (-1, c_a))  # [*, i, c, j, c]
        outer = outer.transpose(-2, -3).flatten(-2)  # [*, i, j, c * c]
        return last_columns(self.linear_out, outer, times(part, c_b))

    @affine_at_the_end
    def finish(self, update: Tensor, count: Tensor) -> Tensor:
        return divide_over(update, (count + self.eps)[..., None])
