"""Multi-head attention over the second-to-last axis: the part that all attending submodules share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evoplan.model.kernels import kernel_in_use
from evoplan.model.regions import SCORES, region
from evoplan.model.remake import cheap
from evoplan.model.submodule import FULL


def mask_bias(mask: Tensor) -> Tensor:
    """0 where the mask is 1, a large negative number where it is 0, finite in the mask's dtype."""
    # AlphaFold adds -1e9, which is -inf in float16 and turns a row without any key into NaN.
    large = min(1e9, torch.finfo(mask.dtype).max / 2)
    return (mask - 1.0).mul_(large)


def transposed(x: Tensor) -> Tensor:
    """[*, a, b, c] to [*, b, a, c], in a tensor of its own: columns become the rows of attention."""
    return x.transpose(-2, -3).contiguous()


class Attention(nn.Module):
    """softmax(q k / sqrt(c) + biases) v, gated by a sigmoid, projected back without its output bias.

    The output bias is added by `finish`, once, so that heads may be run in groups.

    Args:
        gated: as AlphaFold 2 has it; else there is neither a gate nor an output bias.

    Source: Jumper et al. (2021), Suppl. Alg. 7, 8, 13, 14.
    """

    def __init__(self, c_in: int, n_head: int, c_head: int, gated: bool = True) -> None:
        super().__init__()
        self.n_head, self.c_head = n_head, c_head
        width = n_head * c_head
        self.linear_q = nn.Linear(c_in, width, bias=False)
        self.linear_k = nn.Linear(c_in, width, bias=False)
        self.linear_v = nn.Linear(c_in, width, bias=False)
        self.linear_g = nn.Linear(c_in, width) if gated else None
        self.linear_o = nn.Linear(width, c_in, bias=gated)

    def forward(
        self, x: Tensor, key_mask: Tensor | None, pair_bias: Tensor | None, heads: slice = FULL
    ) -> Tensor:
        """The contribution of `heads`.

        Args:
            x: [*, rows, n, c_in], layer-normed.
            key_mask: [*, rows, n]; None: every key counts.
            pair_bias: [*, heads, n, n], shared by all rows, or None.

        Returns:
            [*, rows, n, c_in]
        """
        first, last, _ = heads.indices(self.n_head)
        width = slice(first * self.c_head, last * self.c_head)
        # The scale goes into the weights: they are smaller than the queries.
        q = self._split(F.linear(x, self.linear_q.weight[width] * self.c_head**-0.5))
        k = self._split(F.linear(x, self.linear_k.weight[width]))
        if (attend := kernel_in_use()) is not None:
            v = self._split(F.linear(x, self.linear_v.weight[width]))
            no_mask = x.new_zeros(()).expand(x.shape[:-1])
            bias = no_mask if key_mask is None else mask_bias(key_mask)
            attended = attend(q, k, v, bias, pair_bias).transpose(-2, -3).flatten(-2)
            del q, k, v
            return self._projected(x, attended, width)
        logits = q @ k.transpose(-1, -2)  # [*, rows, heads, n, n]
        del q, k
        # In place: the backward of a product does not read its result.
        if key_mask is not None:
            logits += mask_bias(key_mask)[..., None, None, :]
        if pair_bias is not None:
            logits += pair_bias.unsqueeze(-4)
        with region(SCORES):
            weights = logits.softmax(dim=-1)
        del logits
        v = self._split(F.linear(x, self.linear_v.weight[width]))
        attended = (weights @ v).transpose(-2, -3).flatten(-2)  # [*, rows, n, heads * c]
        del weights, v
        return self._projected(x, attended, width)

    def _projected(self, x: Tensor, attended: Tensor, width: slice) -> Tensor:
        if self.linear_g is None:
            return F.linear(attended, self.linear_o.weight[:, width])
        gate = cheap(torch.sigmoid, F.linear(x, self.linear_g.weight[width], self.linear_g.bias[width]))
        return F.linear(cheap(torch.mul, gate, attended), self.linear_o.weight[:, width])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.c_head)).transpose(-2, -3)  # [*, rows, heads, n, c]
