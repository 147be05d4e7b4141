"""Closed formulas for the arithmetic of one Evoformer block, main or extra. Free of torch.

Matrix products only, a multiply-add counting two, for a submodule that runs whole or in chunks; co-shards
of the outer product each compute the right factor again. Equal to torch's FlopCounterMode.

Source: Jumper et al. (2021), Suppl. Alg. 7-15 and 19.
"""

from __future__ import annotations

from typing import NamedTuple

from model.config import EvoformerConfig, InputShape


class Flops(NamedTuple):
    """Floating-point operations of one submodule; backward does not include a recompute."""

    forward: int
    backward: int


def submodule_flops(config: EvoformerConfig, shape: InputShape) -> dict[str, Flops]:
    """FLOPs of each submodule of one block, in the order in which they run.

    Both operands of a product need a gradient, and each gradient is a product of the same size: backward is
    twice forward. The one exception is the mean in a global attention, whose left operand is a mask.
    """
    s, r, c_m, c_z = shape.n_seq, shape.n_res, config.c_m, config.c_z
    c, tri = config.c_opm, config.c_tri
    multiplication = r**2 * (5 * c_z * tri + c_z**2) + r**3 * tri
    triangle_attention = (
        _attention(r, r, c_z, config.n_head_pair, config.c_head) + r**2 * c_z * config.n_head_pair
    )
    is_global = config.column_attention == "global"
    column_attention = _global_attention if is_global else _attention
    by_mask = {"column_attention": s * r * c_m} if is_global else {}
    multiply_adds = {
        "row_attention": _attention(s, r, c_m, config.n_head_msa, config.c_head_msa)
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


def block_flops(config: EvoformerConfig, shape: InputShape) -> Flops:
    """FLOPs of one block."""
    submodules = submodule_flops(config, shape).values()
    return Flops(sum(flops.forward for flops in submodules), sum(flops.backward for flops in submodules))


def _attention(rows: int, length: int, c_in: int, heads: int, c_head: int) -> int:
    """Multiply-adds: q, k, v, gate and output; scores and weighted sum."""
    width = heads * c_head
    return rows * length * width * (5 * c_in + 2 * length)


def _global_attention(rows: int, length: int, c_in: int, heads: int, c_head: int) -> int:
    """Multiply-adds: mean and q, once a row; k and v, gate and output; scores and weighted sum."""
    width = heads * c_head
    once = length * c_in + c_in * width
    return rows * (once + length * (2 * c_in * c_head + 2 * c_in * width + 2 * width))
