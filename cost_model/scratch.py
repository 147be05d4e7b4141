"""Scratch of CPU kernels: bytes that an operator allocates and frees again before it returns.

A trace on fake tensors does not see it. On the CPU these operators have some:

- Matrix products. In half precision oneDNN packs and blocks its operands in a buffer whose size
  follows from shapes, strides and threads in no simple way; in any precision an operand of a
  batched product that the kernel cannot read as it lies is copied. So each distinct product is run
  once, on zeros, and its allocations are read from the profiler.
- native_layer_norm and its backward: copies of inputs that are not contiguous and, in backward, two
  rows per thread in which the gradients of scale and bias are summed. This is a closed form.
- Any operator with a Python number: it becomes a tensor of one element, of a few bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import _disable_current_modes

# Products beyond either limit are not run; a smaller one stands for them.
MAX_FLOPS = 2 * 10**9
MAX_BYTES = 2**28  # of the operands

# A number of 8 bytes and its copy in the operator's dtype.
NUMBER_BYTES = 16

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
# MKL multiplies these as they lie.
_WITHOUT_SCRATCH = {(op, torch.float32) for op in (_aten.mm.default, _aten.addmm.default)}
_NORMS = {_aten.native_layer_norm.default, _aten.native_layer_norm_backward.default}


class TensorSpec(NamedTuple):
    """A tensor without data; strides in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize

    def zeros(self) -> Tensor:
        """A real tensor like it."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return torch.zeros(last + 1, dtype=self.dtype).as_strided(self.shape, self.stride)

    @property
    def is_dense(self) -> bool:
        """Whether it lies in memory without gaps, its last two dimensions in either order."""
        swapped = (*self.shape[:-2], *self.shape[:-3:-1]), (*self.stride[:-2], *self.stride[:-3:-1])
        return any(_is_contiguous(*layout) for layout in ((self.shape, self.stride), swapped))


class Call(NamedTuple):
    """An operator and what its scratch depends on; hashable."""

    operator: Any
    args: tuple

    @property
    def tensors(self) -> list[TensorSpec]:
        return [arg for arg in self.args if isinstance(arg, TensorSpec)]


class CpuScratch:
    """Scratch of operators on this machine's CPU, with its present number of threads."""

    def call(self, operator: Any, args: tuple) -> Call | None:
        """What to ask `measure` about; None for an operator without scratch (but for `NUMBER_BYTES`)."""
        if operator in _PRODUCTS:
            if (operator, args[0].dtype) in _WITHOUT_SCRATCH:
                return None
        elif operator not in _NORMS:
            return None
        return Call(operator, tuple(map(_hashable, args)))

    def measure(self, calls: Iterable[Call]) -> dict[Call, int]:
        """Scratch bytes of each call, beyond its outputs. What has to be run is run once in a process."""
        calls = list(calls)
        threads = torch.get_num_threads()
        stand_ins = {call: _within_limits(call) for call in calls if call.operator in _PRODUCTS}
        unknown = {call for call in stand_ins.values() if (threads, call) not in _measured}
        for call, size in _run(unknown).items():
            _measured[threads, call] = size
        return {call: self._of(call, stand_ins.get(call), threads) for call in calls}

    def _of(self, call: Call, stand_in: Call | None, threads: int) -> int:
        if stand_in is None:
            return _norm_scratch(call, threads)
        copied = 0 if stand_in is call else sum(t.nbytes for t in call.tensors if not t.is_dense)
        return copied + _measured[threads, stand_in] + NUMBER_BYTES


_measured: dict[tuple[int, Call], int] = {}  # by threads and call


def _hashable(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return TensorSpec(tuple(arg.shape), arg.stride(), arg.dtype)
    return tuple(arg) if isinstance(arg, list) else arg


def _norm_scratch(call: Call, threads: int) -> int:
    copied = sum(t.nbytes for t in call.tensors if not _is_contiguous(t.shape, t.stride))
    if call.operator is _aten.native_layer_norm.default:
        return copied
    *_, normalized, _, _, weight, _, _ = call.args
    dtype = call.args[0].dtype if weight is None else weight.dtype
    return copied + 2 * threads * prod(normalized) * dtype.itemsize


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def _within_limits(call: Call) -> Call:
    """The product itself or, beyond the limits, a dense one with its longest dimensions cut.

    Buffers of blocks stop growing with the operands, and are largest for powers of two: so a
    dimension is cut to one. Copies of operands do not stop; the caller counts them.
    """
    *added, left, right = call.tensors
    *batch, rows, inner = left.shape
    sizes = [*batch, rows, inner, right.shape[-1]]
    if _flops(sizes) <= MAX_FLOPS and left.nbytes + right.nbytes <= MAX_BYTES:
        return call
    while _flops(sizes) > MAX_FLOPS or _elements(sizes) * left.dtype.itemsize > MAX_BYTES:
        longest = sizes.index(max(sizes))
        sizes[longest] = 1 << (sizes[longest] - 1).bit_length() - 1
    *batch, rows, inner, columns = sizes
    operands = [
        _dense((*batch, rows, inner), left),
        _dense((*batch, inner, columns), right),
    ]
    bias = [_dense((columns,) if len(t.shape) == 1 else (*batch, rows, columns), t) for t in added]
    return Call(call.operator, (*bias, *operands))


def _flops(sizes: list[int]) -> int:
    return 2 * prod(sizes)


def _elements(sizes: list[int]) -> int:
    *batch, rows, inner, columns = sizes
    return prod(batch) * inner * (rows + columns)


def _dense(shape: tuple[int, ...], like: TensorSpec) -> TensorSpec:
    """Without gaps, its last two dimensions in the order in which `like` has them."""
    order = list(range(len(shape)))
    if len(shape) > 1 and like.stride[-2] < like.stride[-1]:
        order[-2:] = order[:-3:-1]
    stride, step = [0] * len(shape), 1
    for dim in reversed(order):
        stride[dim], step = step, step * shape[dim]
    return TensorSpec(shape, tuple(stride), like.dtype)


def _run(calls: Iterable[Call]) -> dict[Call, int]:
    """Run each call for real and read its scratch from the allocator's events."""
    marked = {f"scratch {i}": call for i, call in enumerate(calls)}
    if not marked:
        return {}
    with (
        _disable_current_modes(),  # a trace on fake tensors may be going on
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        for mark, call in marked.items():
            args = [arg.zeros() if isinstance(arg, TensorSpec) else arg for arg in call.args]
            with record_function(mark):
                output = call.operator(*args)
            del args, output
    events = profiler.profiler.kineto_results.events()
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return {
        marked[event.name()]: _scratch_between(allocations, event.start_ns(), event.end_ns())
        for event in events
        if event.name() in marked
    }


def _scratch_between(allocations: list[tuple[int, int]], start_ns: int, end_ns: int) -> int:
    """Peak within a time span above what remains at its end, in bytes."""
    first = bisect_left(allocations, start_ns, key=lambda a: a[0])
    last = bisect_right(allocations, end_ns, key=lambda a: a[0])
    live = peak = 0
    for _, size in allocations[first:last]:
        live += size
        peak = max(peak, live)
    return peak - live
