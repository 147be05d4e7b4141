"""The submodules that rewrite the MSA representation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evoplan.model.families import EvoformerConfig
from evoplan.model.modules.attention import Attention, mask_bias, transposed
from evoplan.model.modules.representations import ALPHAFOLD
from evoplan.model.running.layers import FULL, last_columns, rows, times
from evoplan.model.running.remake import cheap
from evoplan.model.running.submodule import ReductionAxis, Submodule
from evoplan.model.running.unread import affine_at_the_end


class MSARowAttentionWithPairBias(Submodule):
    """Attention along each row of the alignment, biased by the pair representation.

    Source: Jumper et al. (2021), Suppl. Alg. 7; row-wise dropout, Suppl. 1.11.6.
    """

    layout = ALPHAFOLD
    target = "m"
    context_inputs = ("z",)
    piece_inputs = ("m", "msa_mask")
    context_dims = ("head", "row", "column")
    context_axis = ("row",)  # rows of z are queries of the bias
    attends = True
    dropout_shared = "seq"

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m), "z": nn.LayerNorm(config.c_z)})
        self.linear_b = nn.Linear(config.c_z, config.n_head_msa, bias=False)
        self.attention = Attention(config.c_m, config.n_head_msa, config.c_head_msa)
        self.dropout = config.dropout_msa
        self.axes = (self.along("seq"), ReductionAxis("head", config.n_head_msa))

    def context(self, z: Tensor, part: slice = FULL) -> Tensor:
        return rows(self.linear_b, z, part).movedim(-1, -3)  # [*, heads, r, r]

    @affine_at_the_end
    def piece(self, m: Tensor, msa_mask: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        update: Tensor = self.attention(m, msa_mask, context, part)
        return update


class MSAColumnAttention(Submodule):
    """Attention along each column of the alignment.

    Source: Jumper et al. (2021), Suppl. Alg. 8.
    """

    layout = ALPHAFOLD
    target = "m"
    attends = True
    piece_inputs = ("m", "msa_mask")

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m)})
        self.attention = Attention(config.c_m, config.n_head_msa, config.c_head_msa)
        self.axes = (self.along("res"), ReductionAxis("head", config.n_head_msa))

    @affine_at_the_end
    def piece(self, m: Tensor, msa_mask: Tensor, context: None = None, part: slice = FULL) -> Tensor:
        columns = cheap(transposed, m)
        update = self.attention(columns, msa_mask.transpose(-1, -2), None, part)
        return transposed(update)


class MSAColumnGlobalAttention(Submodule):
    """Attention along each column of the alignment from one query per head, the mean over its sequences.

    Keys and values are shared by the heads. Every sequence gates what its column attended to on its own, so
    memory grows with s where MSAColumnAttention's grows with s^2.

    Source: Jumper et al. (2021), Suppl. Alg. 19; the mean over present sequences as in AlphaFold's code.
    """

    layout = ALPHAFOLD
    target = "m"
    piece_inputs = ("m", "msa_mask")
    eps = 1e-10

    def __init__(self, config: EvoformerConfig) -> None:
        super().__init__()
        self.n_head, self.c_head = config.n_head_msa, config.c_head_msa
        width = self.n_head * self.c_head
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m)})
        self.linear_q = nn.Linear(config.c_m, width, bias=False)
        self.linear_k = nn.Linear(config.c_m, self.c_head, bias=False)
        self.linear_v = nn.Linear(config.c_m, self.c_head, bias=False)
        self.linear_g = nn.Linear(config.c_m, width)
        self.linear_o = nn.Linear(width, config.c_m)
        self.axes = (self.along("res"), ReductionAxis("head", self.n_head))

    @affine_at_the_end
    def piece(self, m: Tensor, msa_mask: Tensor, context: None = None, part: slice = FULL) -> Tensor:
        width = times(part, self.c_head)
        attended = self._attended(m, msa_mask.transpose(-1, -2).contiguous(), width)
        gate = cheap(torch.sigmoid, rows(self.linear_g, m, width))
        return last_columns(self.linear_o, cheap(torch.mul, gate, attended.unsqueeze(-3)), width)

    def _attended(self, m: Tensor, mask: Tensor, width: slice) -> Tensor:
        """[*, r, heads * c]: what each column attends to, by the heads in `width`; mask is [*, r, s]."""
        # The mean of queries is the query of the mean: Linear has no bias. Divided before the sum, which
        # in float16 may be large; the eps is not to vanish there either, or an empty column becomes NaN.
        eps = max(self.eps, torch.finfo(mask.dtype).tiny)
        shares = mask / (mask.sum(-1, keepdim=True) + eps)
        mean = (shares.unsqueeze(-2) @ m.transpose(-2, -3)).squeeze(-2)  # [*, r, c_m]
        q = rows(self.linear_q, mean, width, self.c_head**-0.5)
        logits = q.unflatten(-1, (-1, self.c_head)) @ self._of_columns(m, self.linear_k).transpose(-1, -2)
        logits += mask_bias(mask, logits.dtype).unsqueeze(-2)  # [*, r, heads, s]
        weights: Tensor = logits.softmax(dim=-1)
        del logits
        return (weights @ self._of_columns(m, self.linear_v)).flatten(-2)

    def _of_columns(self, m: Tensor, linear: nn.Linear) -> Tensor:
        # Transposed when it is c wide, and not m before: m is many times wider.
        x: Tensor = linear(m)
        return x.transpose(-2, -3).contiguous()  # [*, r, s, c]
