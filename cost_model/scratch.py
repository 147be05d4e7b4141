"""Scratch of CPU kernels: bytes that an operator allocates and frees again before it returns.

A trace on fake tensors does not see them. On the CPU these operators have some:

- native_layer_norm and its backward: copies of inputs that are not contiguous; in backward also two
  rows per thread, in which the gradients of scale and bias are summed.
- Batched products: a copy of one matrix of an operand whose rows and columns both have gaps.
- Products in half precision, where oneDNN runs them: it packs blocks of the operands and of the
  result in buffers whose size follows from shapes, strides and threads in no simple way. Such a
  product is run once, on ones, and its allocations are read from the profiler.
- Convolutions, torch's attention, and a few others that nobody has a formula for: run once as well.
- The softmax of torch's attention where it is made of operators: which logits, and which rows, are masked.
- Losses that are reduced: what they are the mean or the sum of.
- Elementwise operators on tensors of unlike dtypes (mixed precision): a copy of each operand that is not of
  the common dtype, and where they write into one that is not, a buffer for the result.
- Any operator with a Python number: it becomes a tensor of one element.

For the others, closed forms give the exact bytes. Checked with torch 2.13 on x86.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import cache, reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import _disable_current_modes

from evoplan.cost_model.tensor_spec import TensorSpec, contiguous_stride

# A product beyond either limit is not run; a smaller one stands for it.
MAX_FLOPS = 2 * 10**9
MAX_BYTES = 2**28  # of its operands

# A number of 8 bytes and its copy in the operator's dtype.
NUMBER_BYTES = 16

_aten = torch.ops.aten
_BATCHED = {_aten.bmm.default, _aten.baddbmm.default}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default} | _BATCHED
# Kernels that are run once, whatever they are given.
_KERNELS = {
    _aten.convolution.default,
    _aten.convolution_backward.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    _aten._trilinear.default,
    _aten._cdist_forward.default,
    _aten._euclidean_dist.default,
    _aten.binary_cross_entropy_with_logits.default,
    _aten.linalg_inv_ex.default,
    _aten.col2im.default,
    _aten.im2col.default,
    _aten.kthvalue.default,
    _aten.linalg_matrix_exp.default,
    _aten._linalg_eigh.default,
    _aten.soft_margin_loss_backward.default,
    _aten.mkldnn_rnn_layer.default,
    _aten.mkldnn_rnn_layer_backward.default,
}
# Losses that are made whole, once more, before they are reduced; and where their reduction stands.
_REDUCED = {_aten.mse_loss.default: 2, _aten.smooth_l1_loss.default: 2, _aten.huber_loss.default: 2}
_SAFE_SOFTMAX = _aten._safe_softmax.default
_SOFTMAXES = {
    _aten._softmax.default,
    _aten._softmax_backward_data.default,
    _aten._log_softmax.default,
    _aten._log_softmax_backward_data.default,
}
# Kernels that copy what lies otherwise than they read it, forward and backward: run once where anything does.
_COPYING = {
    getattr(_aten, name + way).default
    for name in ("native_batch_norm", "native_group_norm", "upsample_nearest2d", "upsample_bilinear2d")
    for way in ("", "_backward")
}
_NORMS = {_aten.native_layer_norm.default, _aten.native_layer_norm_backward.default}


class Call(NamedTuple):
    """An operator and the arguments that its scratch depends on."""

    operator: Any
    args: tuple[Any, ...]

    @classmethod
    def of(cls, operator: Any, args: tuple[Any, ...]) -> Call:
        """That on these tensors."""
        return cls(operator, tuple(map(_hashable, args)))

    @property
    def tensors(self) -> list[TensorSpec]:
        """Those of its arguments that are tensors; the factors of a product come last."""
        return [arg for arg in self.args if isinstance(arg, TensorSpec)]


class CpuScratch:
    """Scratch of operators on this machine's CPU, with its present number of threads."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        known = torch.ops.mkldnn
        self.onednn_dtypes = set()
        if torch.backends.mkldnn.is_available():
            if known._is_mkldnn_bf16_supported():
                self.onednn_dtypes.add(torch.bfloat16)
            if known._is_mkldnn_fp16_supported():
                self.onednn_dtypes.add(torch.float16)

    def call(self, operator: Any, args: tuple[Any, ...]) -> Call | None:
        """What to ask the other methods about; None: no scratch, except `NUMBER_BYTES`."""
        if operator in _REDUCED or operator is _SAFE_SOFTMAX:
            return Call.of(operator, args)
        if _is_pointwise(operator):
            dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor)}
            return None if len(dtypes) < 2 else Call.of(operator, args)
        if operator in _SOFTMAXES or operator in _COPYING:
            in_order = all(arg.is_contiguous() for arg in args if isinstance(arg, Tensor))
            return None if in_order else Call.of(operator, args)
        if not any(operator in known for known in (_PRODUCTS, _NORMS, _KERNELS)):
            return None
        return Call.of(operator, args)

    def bound_bytes(self, call: Call) -> int:
        """Not less than `bytes`, without running anything."""
        if not self._is_onednn(call):
            return self.bytes(call)  # of convolutions, too: nobody knows before they have run
        # All of both factors and of a float32 result, in whole blocks, for each thread.
        left, right = call.tensors[-2:]
        rows, inner, columns = (-(-n // 64) * 64 for n in (*left.shape[-2:], right.shape[-1]))
        packed = left.dtype.itemsize * inner * (rows + columns) + 4 * rows * columns
        return _not_dense_bytes(call) + self.threads * (packed + 4096) + NUMBER_BYTES

    def bytes(self, call: Call) -> int:
        """Scratch of a call beyond its outputs. A oneDNN product is run once per process."""
        if call.operator in _REDUCED:
            return _loss_bytes(call) + NUMBER_BYTES
        if call.operator is _SAFE_SOFTMAX:
            return _softmax_bytes(call) + NUMBER_BYTES
        if _is_pointwise(call.operator):
            return _cast_bytes(call) + NUMBER_BYTES
        if call.operator in _NORMS:
            return _norm_bytes(call, self.threads) + NUMBER_BYTES
        if call.operator in _SOFTMAXES:
            return _copied_bytes(call) + NUMBER_BYTES
        if call.operator not in _KERNELS | _COPYING and not self._is_onednn(call):
            return _gapped_matrix_bytes(call) + NUMBER_BYTES
        stand_in = call if call.operator in _KERNELS | _COPYING else _within_limits(call)
        key = self.threads, stand_in
        if key not in _measured:
            _measured[key] = _run(stand_in)
        return _measured[key] + (_not_dense_bytes(call) if stand_in is not call else 0) + NUMBER_BYTES

    def _is_onednn(self, call: Call) -> bool:
        return call.operator in _PRODUCTS and call.tensors[-1].dtype in self.onednn_dtypes


_measured: dict[tuple[int, Call], int] = {}  # bytes, by threads and call


def _hashable(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return TensorSpec(tuple(arg.shape), arg.stride(), arg.dtype)
    return tuple(arg) if isinstance(arg, list) else arg


@cache
def _is_pointwise(operator: Any) -> bool:
    return torch.Tag.pointwise in operator.tags


@cache
def _writes_first(operator: Any) -> bool:
    alias = operator._schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def _cast_bytes(call: Call) -> int:
    """Copies in the common dtype: of operands, and of a result that is written into one of another dtype."""
    # Tensors without dimensions give way to others.
    dtypes = [t.dtype for t in call.tensors if t.shape] or [t.dtype for t in call.tensors]
    common = reduce(torch.promote_types, dtypes)
    copied = [tensor for tensor in call.tensors if tensor.dtype != common]
    if _writes_first(call.operator) and call.tensors[0].dtype != common:
        copied.append(call.tensors[0])
    return sum(prod(tensor.shape) * common.itemsize for tensor in copied)


def _loss_bytes(call: Call) -> int:
    given, target, *_ = call.tensors
    at = _REDUCED[call.operator]
    if call.args[at:] and not call.args[at]:
        return 0
    dtype = torch.promote_types(given.dtype, target.dtype)
    shape: tuple[int, ...] = torch.broadcast_shapes(given.shape, target.shape)
    return prod(shape) * dtype.itemsize


def _softmax_bytes(call: Call) -> int:
    (logits,) = call.tensors
    rows = prod(size for at, size in enumerate(logits.shape) if at != call.args[1] % len(logits.shape))
    return prod(logits.shape) + rows


def _copied_bytes(call: Call) -> int:
    return sum(tensor.nbytes for tensor in call.tensors if not tensor.is_contiguous)


def _norm_bytes(call: Call, threads: int) -> int:
    copied = _copied_bytes(call)
    if call.operator is _aten.native_layer_norm.default:
        return copied
    normalized: tuple[int, ...]
    grad: TensorSpec
    weight: TensorSpec | None
    grad, _, normalized, _, _, weight, *_ = call.args
    return copied + 2 * threads * prod(normalized) * (weight or grad).dtype.itemsize


def _gapped_matrix_bytes(call: Call) -> int:
    if call.operator not in _BATCHED:
        return 0
    gapped = [factor for factor in call.tensors[-2:] if 1 not in factor.stride[-2:]]
    return sum(prod(factor.shape[-2:]) * factor.dtype.itemsize for factor in gapped)


def _not_dense_bytes(call: Call) -> int:
    """Bytes of the factors that are copied before oneDNN sees them."""
    return sum(factor.nbytes for factor in call.tensors[-2:] if not factor.is_dense)


def _within_limits(call: Call) -> Call:
    """The product itself or, beyond the limits, a dense one whose longest dimensions are cut.

    Packing buffers stop growing with the dimensions, and are largest where these are powers of two:
    so a dimension is cut to one. Copies of whole factors do not stop growing: the caller adds them.
    """
    *added, left, right = call.tensors
    *batch, rows, inner, columns = sizes = [*left.shape, right.shape[-1]]
    while (
        2 * prod(sizes) > MAX_FLOPS
        or prod(batch) * inner * (rows + columns) * left.dtype.itemsize > MAX_BYTES
    ):
        longest = sizes.index(max(sizes))
        sizes[longest] = 1 << (sizes[longest] - 1).bit_length() - 1
        *batch, rows, inner, columns = sizes
    if sizes == [*left.shape, right.shape[-1]]:
        return call
    result = (*batch, rows, columns)
    return Call(
        call.operator,
        (
            *(_dense(result[-len(tensor.shape) :], tensor) for tensor in added),
            _dense((*batch, rows, inner), left),
            _dense((*batch, inner, columns), right),
        ),
    )


def _dense(shape: tuple[int, ...], like: TensorSpec) -> TensorSpec:
    """A dense tensor, its matrices by columns where those of `like` are."""
    if len(shape) > 1 and like.stride[-2] < like.stride[-1]:
        return _dense((*shape[:-2], shape[-1], shape[-2]), like.transposed).transposed
    return TensorSpec(shape, contiguous_stride(shape), like.dtype)


@cache
def made_bytes(call: Call) -> tuple[int, ...]:
    """Of each tensor that a call makes, as it is when it runs for real."""
    with _disable_current_modes(), torch.enable_grad():  # some keep less where there is no backward
        out = call.operator(*(arg.ones() if isinstance(arg, TensorSpec) else arg for arg in call.args))
        return tuple(tensor.untyped_storage().nbytes() for tensor in out)


def _run(call: Call) -> int:
    """Run a call for real; its scratch from the allocator's events."""
    mark = "scratch"
    with (
        _disable_current_modes(),  # a trace on fake tensors may be going on
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        args = [arg.ones() if isinstance(arg, TensorSpec) else arg for arg in call.args]
        with record_function(mark):
            output = call.operator(*args)
        del args, output
    events = profiler.profiler.kineto_results.events()
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    span = next(event for event in events if event.name() == mark)
    first = bisect_left(allocations, span.start_ns(), key=lambda a: a[0])
    last = bisect_right(allocations, span.end_ns(), key=lambda a: a[0])
    live = peak = 0
    for _, size in allocations[first:last]:
        live += size
        peak = max(peak, live)
    return peak - live  # what is live at the end are the outputs
