"""Our submodules, made for other people's layers: by their widths alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from evoplan.model.families import EvoformerConfig, PairformerConfig
from evoplan.model.modules.msa import MSAColumnAttention, MSARowAttentionWithPairBias
from evoplan.model.modules.outer_product_mean import OuterProductMean
from evoplan.model.modules.triangle_attention import TriangleAttention
from evoplan.model.modules.triangle_multiplication import TriangleMultiplication

# Gated attention as nearly everybody names its layers. Ours: theirs.
ATTENTION = {f"attention.linear_{name}": f"linear_{name}" for name in "qkvgo"}


def triangle_attention(
    node: Literal["starting", "ending"], transposed_bias: bool, c_z: int, heads: int, c_head: int
) -> TriangleAttention:
    """Of a node, without dropout."""
    config = PairformerConfig(c_z=c_z, n_head_pair=heads, c_head=c_head, dropout_pair=0.0)
    return TriangleAttention(config, node, transposed_bias=transposed_bias)


def triangle_multiplication(
    edges: Literal["outgoing", "incoming"], c_z: int, c_hidden: int
) -> TriangleMultiplication:
    """Along edges of a direction, without dropout."""
    return TriangleMultiplication(PairformerConfig(c_z=c_z, c_tri=c_hidden, dropout_pair=0.0), edges)


def row_attention(c_m: int, c_z: int, heads: int, c_head: int) -> MSARowAttentionWithPairBias:
    """Without dropout."""
    config = EvoformerConfig(c_m=c_m, c_z=c_z, n_head_msa=heads, c_head_msa=c_head, dropout_msa=0.0)
    return MSARowAttentionWithPairBias(config)


def column_attention(c_m: int, heads: int, c_head: int) -> MSAColumnAttention:
    """Of AlphaFold 2's main stack."""
    return MSAColumnAttention(EvoformerConfig(c_m=c_m, n_head_msa=heads, c_head_msa=c_head))


def outer_product_mean(c_m: int, c_z: int, c_hidden: int) -> OuterProductMean:
    """Of sequences."""
    return OuterProductMean(EvoformerConfig(c_m=c_m, c_z=c_z, c_opm=c_hidden))


def as_large(mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """A mask of all that is there, or as it is given, spread over a batch."""
    return like.new_ones(()).expand(shape) if mask is None else mask.expand(shape)


def flipped(z: Tensor) -> Tensor:
    """[*, i, j, c] to [*, j, i, c]; a view."""
    return z.transpose(-2, -3)
