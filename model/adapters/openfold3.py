"""OpenFold-3's layers, which OpenFold's AlphaFold 2 has as well. Source: openfold3.core.model.layers, 0.5.

Of tokens it attends in single precision whatever the model is in: not a submodule of ours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evoplan.model.adapters.adapter import Adapter, Call
from evoplan.model.adapters.maths import (
    ATTENTION,
    as_large,
    column_attention,
    flipped,
    outer_product_mean,
    row_attention,
    triangle_attention,
    triangle_multiplication,
)
from evoplan.model.modules.outer_product_mean import pair_count

_LAYERS = "openfold3.core.model.layers"
_INF, _EPS = 1e9, 1e-3
# Another way to compute the same, asked for by the caller.
_ELSEWISE = (
    "chunk_size", "use_deepspeed_evo_attention", "use_cueq_triangle_kernels", "use_triton_triangle_kernels",
    "use_lma", "inplace_safe", "_chunk_logits", "_checkpoint_chunks",
)  # fmt: skip


def _elsewise(options: dict[str, Any]) -> bool:
    return any(options.get(name) for name in _ELSEWISE)


def _triangle_attention(
    module: Any, x: Tensor, mask: Tensor | None, transpose_bias: bool, **options: Any
) -> Call | None:
    if _elsewise(options) or module.inf != _INF:
        return None
    mask, widths = as_large(mask, x.shape[:-1], x), (module.c_in, module.no_heads, module.c_hidden)
    if module.starting and not transpose_bias:
        return Call(("starting", False, *widths), {"z": x, "pair_mask": mask})
    if module.starting:  # the ending node on what its caller has turned
        return Call(("ending", False, *widths), {"z": flipped(x), "pair_mask": mask.mT}, flipped)
    return Call(("ending", not transpose_bias, *widths), {"z": x, "pair_mask": mask})


def _triangle_multiplication(module: Any, z: Tensor, mask: Tensor | None, **options: Any) -> Call | None:
    if _elsewise(options):
        return None
    kind = "outgoing" if module._outgoing else "incoming", module.c_z, module.c_hidden
    return Call(kind, {"z": z, "pair_mask": as_large(mask, z.shape[:-1], z)})


def _row_attention(
    module: Any, m: Tensor, z: Tensor | None, mask: Tensor | None, **options: Any
) -> Call | None:
    if _elsewise(options) or module.inf != _INF or z is None:
        return None
    kind = module.c_in, module.c_z, module.no_heads, module.c_hidden
    return Call(kind, {"m": m, "z": z, "msa_mask": as_large(mask, m.shape[:-1], m)})


def _column_attention(module: Any, m: Tensor, mask: Tensor | None, **options: Any) -> Call | None:
    if _elsewise(options) or module.inf != _INF:
        return None
    kind = module.c_m, module.no_heads, module.c_hidden
    return Call(kind, {"m": m, "msa_mask": as_large(mask, m.shape[:-1], m)})


def _outer_product_mean(module: Any, m: Tensor, mask: Tensor | None, **options: Any) -> Call | None:
    if _elsewise(options) or module.eps != _EPS:
        return None
    mask, (*batch, _, n, _) = as_large(mask, m.shape[:-1], m), m.shape
    z = m.new_zeros(()).expand(*batch, n, n, module.c_z)  # nobody reads it: what is added to is the block's
    tensors = {"m": m, "z": z, "msa_mask": mask, "pair_count": pair_count(mask)}
    return Call((module.c_m, module.c_z, module.c_hidden), tensors)


def _mha(attention: str) -> dict[str, str]:
    return {ours: f"{attention}.{theirs}" for ours, theirs in ATTENTION.items()}


ADAPTERS = (
    Adapter(
        f"{_LAYERS}.triangular_attention",
        "TriangleAttention",
        triangle_attention,
        {"norms.z": "layer_norm", "linear_b": "linear_z", **_mha("mha")},
        _triangle_attention,
    ),
    Adapter(
        f"{_LAYERS}.triangular_attention",
        "TriangleAttentionEndingNode",
        triangle_attention,
        {"norms.z": "layer_norm", "linear_b": "linear_z", **_mha("mha")},
        _triangle_attention,
    ),
    *(
        Adapter(
            f"{_LAYERS}.triangular_multiplicative_update",
            f"TriangleMultiplication{edges}",
            triangle_multiplication,
            {
                "norms.z": "layer_norm_in",
                "linear_a": "linear_a_p",
                "linear_a_gate": "linear_a_g",
                "linear_b": "linear_b_p",
                "linear_b_gate": "linear_b_g",
                "norm_product": "layer_norm_out",
                "linear_out": "linear_z",
                "linear_gate": "linear_g",
            },
            _triangle_multiplication,
        )
        for edges in ("Outgoing", "Incoming")
    ),
    Adapter(
        f"{_LAYERS}.msa",
        "MSARowAttentionWithPairBias",
        row_attention,
        {"norms.m": "layer_norm_m", "norms.z": "layer_norm_z", "linear_b": "linear_z", **_mha("mha")},
        _row_attention,
    ),
    Adapter(
        f"{_LAYERS}.msa",
        "MSAColumnAttention",
        column_attention,
        {"norms.m": "_msa_att.layer_norm_m", **_mha("_msa_att.mha")},
        _column_attention,
    ),
    Adapter(
        f"{_LAYERS}.outer_product_mean",
        "OuterProductMean",
        outer_product_mean,
        {"norms.m": "layer_norm", "linear_a": "linear_1", "linear_b": "linear_2", "linear_out": "linear_out"},
        _outer_product_mean,
    ),
)
