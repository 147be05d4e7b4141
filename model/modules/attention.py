"""Multi-head attention over the second-to-last axis: the part that all attending submodules share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evoplan.model.running.in_place import add_over, multiply_over
from evoplan.model.running.kernels import kernel_in_use
from evoplan.model.running.layers import FULL, last_columns, rows, times
from evoplan.model.running.regions import SCORES, region
from evoplan.model.running.remake import cheap


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is 1, a large negative number where it is 0: finite in `dtype`, that of the logits."""
    # AlphaFold adds -1e9, which is -inf in float16 and turns a row without any key into NaN. Under autocast
    # the logits are in another precision than the mask.
    large = min(1e9, *(torch.finfo(each).max / 2 for each in (dtype, mask.dtype)))
    return multiply_over(mask - 1.0, large).to(dtype)


def transposed(x: Tensor) -> Tensor:
    """[*, a, b, c] to [*, b, a, c], in a tensor of its own: columns become the rows of attention."""
    return x.transpose(-2, -3).contiguous()


class Attention(nn.Module):
    """softmax(q k / sqrt(c) + biases) v, gated by a sigmoid and projected back.

    Heads may be run in groups, whose contributions add up; the output bias is in the first one's.

    Args:
        gated: as AlphaFold 2 has it; else there is neither a gate nor an output bias.
        bias: of gate and output; AlphaFold 3 has none.

    Source: Jumper et al. (2021), Suppl. Alg. 7, 8, 13, 14.
    """

    def __init__(self, c_in: int, n_head: int, c_head: int, gated: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.n_head, self.c_head = n_head, c_head
        width = n_head * c_head
        self.linear_q = nn.Linear(c_in, width, bias=False)
        self.linear_k = nn.Linear(c_in, width, bias=False)
        self.linear_v = nn.Linear(c_in, width, bias=False)
        self.linear_g = nn.Linear(c_in, width, bias=bias) if gated else None
        self.linear_o = nn.Linear(width, c_in, bias=gated and bias)

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
        width = times(heads, self.c_head)
        q = self._split(rows(self.linear_q, x, width, self.c_head**-0.5))
        k = self._split(rows(self.linear_k, x, width))
        if (attend := kernel_in_use()) is not None:
            v = self._split(rows(self.linear_v, x, width))
            no_mask = q.new_zeros(()).expand(x.shape[:-1])
            bias = no_mask if key_mask is None else mask_bias(key_mask, q.dtype)
            attended = attend(q, k, v, bias, pair_bias).transpose(-2, -3).flatten(-2)
            del q, k, v
            return self._projected(x, attended, width)
        logits = q @ k.transpose(-1, -2)  # [*, rows, heads, n, n]
        del q, k
        # In place: the backward of a product does not read its result.
        if key_mask is not None:
            logits = add_over(logits, mask_bias(key_mask, logits.dtype)[..., None, None, :])
        if pair_bias is not None:
            logits = add_over(logits, pair_bias.unsqueeze(-4))
        with region(SCORES):
            weights = logits.softmax(dim=-1)
        del logits
        v = self._split(rows(self.linear_v, x, width))
        attended = (weights @ v).transpose(-2, -3).flatten(-2)  # [*, rows, n, heads * c]
        del weights, v
        return self._projected(x, attended, width)

    def _projected(self, x: Tensor, attended: Tensor, width: slice) -> Tensor:
        if self.linear_g is None:
            return last_columns(self.linear_o, attended, width)
        gate = cheap(torch.sigmoid, rows(self.linear_g, x, width))
        return last_columns(self.linear_o, cheap(torch.mul, gate, attended), width)

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.c_head))
        return heads.transpose(-2, -3)  # [*, rows, heads, n, c]
