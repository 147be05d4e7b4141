"""Boltz's attention over the pair representation. Source: boltz.model.layers, 2.2.

Its triangle multiplication goes over to single precision by itself, and so does its attention over tokens:
neither is a submodule of ours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evoplan.model.adapters.adapter import Adapter, Call
from evoplan.model.adapters.maths import ATTENTION, as_large, triangle_attention

_INF = 1e9


def _triangle_attention(
    module: Any, x: Tensor, mask: Tensor | None, chunk_size: int | None, use_kernels: bool
) -> Call | None:
    if chunk_size is not None or use_kernels or module.inf != _INF:
        return None
    node = "starting" if module.starting else "ending"
    kind = node, not module.starting, module.c_in, module.no_heads, module.c_hidden
    return Call(kind, {"z": x, "pair_mask": as_large(mask, x.shape[:-1], x)})


ADAPTERS = tuple(
    Adapter(
        "boltz.model.layers.triangular_attention.attention",
        name,
        triangle_attention,
        {
            "norms.z": "layer_norm",
            "linear_b": "linear",
            **{ours: f"mha.{theirs}" for ours, theirs in ATTENTION.items()},
        },
        _triangle_attention,
    )
    for name in ("TriangleAttention", "TriangleAttentionEndingNode")
)
