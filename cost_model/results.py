"""What operators make on tensors without data, where that differs from what they make of real ones.

Checked with torch 2.13 against the results of some two hundred operators, on x86.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from evoplan.cost_model.scratch import Call, made_bytes
from evoplan.model.foreign.writes import given_as

_aten = torch.ops.aten


def as_real(func: Any, args: tuple[Any, ...], out: Any, on_cpu: bool) -> Any:
    """The results of an operator with the dtypes, strides and storages that real ones have."""
    if func is _LAYER_NORM:
        return _with_statistics(out, args[0], args[2], on_cpu)
    if func is _VIEW and 1 in out.shape:
        return _strided_as_viewed(out)
    if func in _REDUCED and given_as(func, args, {}, "reduction", 1):
        given, target, *_ = args
        return _in_storage_of(out, prod(torch.broadcast_shapes(given.shape, target.shape)))
    if (
        func is _RNN and on_cpu and torch.is_grad_enabled()
    ):  # the last is what backward reads, in a form that only the kernel knows
        return (*out[:-1], out[-1].new_empty(made_bytes(Call.of(func, args))[-1]))
    if func is _COL2IM and on_cpu:
        return _in_storage_of(out, args[0].numel())
    return out


_LAYER_NORM = _aten.native_layer_norm.default
_VIEW = _aten.view.default
_RNN = _aten.mkldnn_rnn_layer.default
_COL2IM = _aten.col2im.default
# Losses whose result keeps the memory of what was reduced to it.
_REDUCED = {
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.soft_margin_loss.default,
    _aten.binary_cross_entropy.default,
}


def _in_storage_of(out: Tensor, numel: int) -> Tensor:
    """A tensor that keeps the memory of so many elements."""
    if numel <= out.numel():
        return out
    return out.new_empty(numel).as_strided(out.shape, out.stride())


def _with_statistics(
    out: tuple[Tensor, ...], x: Tensor, weight: Tensor | None, on_cpu: bool
) -> tuple[Tensor, ...]:
    """A normalisation's results with means and deviations in the dtype that real tensors get them in.

    Of half precision that is float32, but on a CPU only where the weight is in float32. Without data they are
    given x's on fake tensors, and float32 on the meta device.
    """
    normalised, *statistics = out
    own = x.dtype.itemsize > 2 or (on_cpu and (weight is None or weight.dtype == x.dtype))
    dtype = x.dtype if own else torch.float32
    return normalised, *(t if t.dtype == dtype else t.new_empty(t.shape, dtype=dtype) for t in statistics)


def _strided_as_viewed(tensor: Tensor) -> Tensor:
    """A view with the strides that real tensors get: a dimension of one element has a new one.

    Fake tensors keep the old one. It addresses nothing, but half-precision products on the CPU choose by it
    how to pack their factors.
    """
    stride = list(tensor.stride())
    for dim in reversed(range(tensor.ndim - 1)):
        if tensor.shape[dim] == 1:
            stride[dim] = stride[dim + 1] * tensor.shape[dim + 1]
    return tensor if tuple(stride) == tensor.stride() else tensor.as_strided(tensor.shape, stride)
