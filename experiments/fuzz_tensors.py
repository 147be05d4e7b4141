"""Tensors as a fuzzer's cases give them: in odd layouts, masked in part."""

from __future__ import annotations

import torch
from torch import Tensor


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The tensor's values in another layout; an expanded batch repeats its first entry."""
    if layout == "transposed":
        dims = (0, 1) if tensor.ndim == 2 else (1, 2)
        return tensor.transpose(*dims).contiguous().transpose(*dims)
    if layout == "channels first":
        return tensor.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "slice":
        larger = tensor.new_ones([size + 2 for size in tensor.shape])
        part = larger[tuple(slice(1, size + 1) for size in tensor.shape)]
        return part.copy_(tensor)
    return tensor[:1].expand(tensor.shape) if layout == "expanded" else tensor


def mask(shape: tuple[int, ...], missing: str) -> Tensor:
    """A mask [b, rows, columns] or [b, columns] in which something is missing."""
    there = torch.rand(shape) > 0.25
    if missing == "rows":
        there &= torch.rand(shape[:-1]).unsqueeze(-1) > 0.4
    elif missing == "columns":
        there &= torch.rand(shape[0], *[1] * (len(shape) - 2), shape[-1]) > 0.4
    elif missing in ("all of it", "none of it"):
        there.fill_(missing == "none of it")
    return there
