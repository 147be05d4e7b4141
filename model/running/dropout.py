"""Dropout masks that any schedule, piece or rank can draw again: a function of (seed, step).

The seed is drawn once per forward pass from torch's default CPU generator, so `torch.manual_seed`
governs it and no RNG state has to be kept for a recompute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evoplan.model.running.submodule import Submodule

_SPREAD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring steps get unrelated seeds


def dropout_mask(submodule: Submodule, target: Tensor, seed: int | None, step: int) -> Tensor | None:
    """Scaled keep mask of `target`'s shape with the shared dimension 1; None where nothing is dropped.

    Source: Jumper et al. (2021), Suppl. Alg. 6, 1.11.6 (DropoutRowwise, DropoutColumnwise).
    """
    rate, shared = submodule.dropout, submodule.dropout_shared_dim
    if seed is None or not rate or shared is None:
        return None
    sharding = submodule.sharding
    generator = torch.Generator("cpu" if target.is_meta else target.device)
    generator.manual_seed((seed + (step + 1) * _SPREAD) % 2**63)
    # Ranks draw the whole mask and keep their part, so that all ranks together drop what one would.
    shape = list(target.shape) if sharding is None else sharding.whole_shape(target)
    shape[shared] = 1
    mask = torch.empty(shape, dtype=target.dtype, device=target.device)
    mask.bernoulli_(1.0 - rate, generator=generator).div_(1.0 - rate)
    return mask if sharding is None else sharding.own(mask)
