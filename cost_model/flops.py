"""Closed formulas for the arithmetic of one block, of an Evoformer or of TinyOpenFold. Free of torch.

Matrix products only, a multiply-add counting two, for a submodule that runs whole or in chunks; co-shards
of the outer product each compute the right factor again. Equal to torch's FlopCounterMode.

Source: Jumper et al. (2021), Suppl. Alg. 7-15 and 19.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from evoplan.model.config import InputShape
from evoplan.model.families import EvoformerConfig, TinyOpenFoldConfig


class Flops(NamedTuple):
    """Floating-point operations of one submodule; backward does not include a recompute."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of a training step."""
        return self.forward + self.backward


def submodule_flops(config: EvoformerConfig | TinyOpenFoldConfig, shape: InputShape) -> dict[str, Flops]:
    """FLOPs of each submodule of one block, in the order in which they run.

    Both operands of a product need a gradient, and each gradient is a product of the same size: backward is
    twice forward. The one exception is the mean in a global attention, whose left operand is a mask.
    """
    s, r, c_m, c_z = shape.n_seq, shape.n_res, config.c_m, config.c_z
    assert s is not None
    c, tri, gated = config.c_opm, config.c_tri, config.gated
    attention = partial(_attention, projections=4 + gated)  # q, k, v, output, and a gate
    multiplication = r**2 * (5 * c_z * tri + c_z**2) + r**3 * tri
    triangle_bias = r**2 * c_z * config.n_head_pair * gated
    triangle_attention = attention(r, r, c_z, config.n_head_pair, config.c_head) + triangle_bias
    is_global = config.column_attention == "global"
    column_attention = _global_attention if is_global else attention
    by_mask = {"column_attention": s * r * c_m} if is_global else {}
    multiply_adds = {
        "row_attention": attention(s, r, c_m, config.n_head_msa, config.c_head_msa)
        + r**2 * c_z * config.n_head_msa,
        "column_attention": column_attention(r, s, c_m, config.n_head_msa, config.c_head_msa),
        "msa_transition": 2 * s * r * config.transition_factor * c_m**2,
        "outer_product_mean": 2 * s * r * c_m * c + s * (r * c) ** 2 + (r * c) ** 2 * c_z,
        "triangle_outgoing": multiplication,
        "triangle_incoming": multiplication,
        "triangle_starting": triangle_attention,
        "triangle_ending": triangle_attention,
        "pair_transition": 2 * r**2 * config.transition_factor * c_z**2,
    }
    flops = 2 * shape.batch  # of a multiply-add
    return {
        name: Flops(flops * count, flops * (2 * count - by_mask.get(name, 0)))
        for name, count in multiply_adds.items()
    }


def block_flops(config: EvoformerConfig | TinyOpenFoldConfig, shape: InputShape) -> Flops:
    """FLOPs of one block."""
    submodules = submodule_flops(config, shape).values()
    return Flops(sum(flops.forward for flops in submodules), sum(flops.backward for flops in submodules))


def tiny_openfold_flops(config: TinyOpenFoldConfig, shape: InputShape) -> dict[str, Flops]:
    """FLOPs of each part of a TinyOpenFold training step: the submodules of all blocks, and what is around.

    Features of pairs need no gradient, so backward of their embedding is one product.
    """
    pairs = 2 * shape.batch * shape.n_res**2 * config.c_z
    of_blocks = {
        name: Flops(config.n_block * flops.forward, config.n_block * flops.backward)
        for name, flops in submodule_flops(config, shape).items()
    }
    embedding = pairs * config.c_pair_features
    return {
        "embedding": Flops(embedding, embedding),
        **of_blocks,
        "distance_head": Flops(pairs, 2 * pairs),
    }


def _attention(rows: int, length: int, c_in: int, heads: int, c_head: int, projections: int) -> int:
    """Multiply-adds: the projections; scores and weighted sum."""
    width = heads * c_head
    return rows * length * width * (projections * c_in + 2 * length)


def _global_attention(rows: int, length: int, c_in: int, heads: int, c_head: int) -> int:
    """Multiply-adds: mean and q, once a row; k and v, gate and output; scores and weighted sum."""
    width = heads * c_head
    once = length * c_in + c_in * width
    return rows * (once + length * (2 * c_in * c_head + 2 * c_in * width + 2 * width))
