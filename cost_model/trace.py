"""Live bytes and work of code run on tensors without data: nothing is computed, no memory is used.

Every storage made under `Trace` is counted from the operator that makes it until its last
reference is gone. The cost is linear in the number of operators.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from evoplan.cost_model.meta_calls import tensors_in
from evoplan.cost_model.results import as_real
from evoplan.cost_model.scratch import NUMBER_BYTES, Call, CpuScratch
from evoplan.model.running.pieces import PieceSample


@dataclass(frozen=True)
class Work:
    """Kernels and collectives run. Kept apart, not summed, because each is bound by its own bottleneck.

    Attributes:
        kernels: by (FLOPs, bytes moved), how many of each.
        collectives: by (bytes that a rank sends, messages that it sends them in), how many of each.
    """

    kernels: Counter[tuple[int, int]] = field(default_factory=Counter)
    collectives: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        """Floating-point operations; a multiply-add counts two."""
        return sum(flops * count for (flops, _), count in self.kernels.items())

    @property
    def bytes(self) -> int:
        """Bytes read and written by all kernels."""
        return sum(moved * count for (_, moved), count in self.kernels.items())

    @property
    def launches(self) -> int:
        """Number of kernels."""
        return self.kernels.total()

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends to others."""
        return sum(sent * count for (sent, _), count in self.collectives.items())

    def __add__(self, other: Work) -> Work:
        return Work(self.kernels + other.kernels, self.collectives + other.collectives)


class _About(NamedTuple):
    """What is asked of an operator at every call.

    Attributes:
        func: itself, which has to live as long as its id is looked up.
        free: whether it does no work.
        writes: whether it writes into what it is given.
        flops: counts those of a call.
    """

    func: Any
    free: bool
    writes: bool
    flops: Callable[..., Any] | None


Operator = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


class Trace(TorchDispatchMode, PieceSample):
    """Counts live bytes of the storages made inside it, their peak, and the work done.

    Args:
        block_bytes: each storage counts as a multiple of this (512 for CUDA's allocator).
        scratch: tells what operators allocate besides their outputs; None: nothing.
        call: runs an operator on its arguments.
    """

    def __init__(
        self, block_bytes: int = 1, scratch: CpuScratch | None = None, call: Operator = _run
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block_bytes, self.scratch, self._call = block_bytes, scratch, call
        self.live_bytes = self._peak_of_storages = 0
        self.kept_number_bytes = 0  # since the last reset, not in `live_bytes`; see `_keeps_number`
        self.kernels: Counter[tuple[int, int]] = Counter()
        self.collectives: Counter[tuple[int, int]] = Counter()
        self._known: set[int] = set()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._elsewhere: set[int] = set()
        self._about: dict[int, _About] = {}  # by the operators' ids: their hashes are worked out in Python
        # For operators with scratch: most bytes live when one of them returns.
        self._live_after: dict[Call, int] = {}

    def reset(self) -> None:
        """Start a phase: its peak begins at what is live now, its work at none."""
        self._peak_of_storages = self.live_bytes
        self._live_after = {}
        self.kept_number_bytes = 0
        self.kernels, self.collectives = Counter(), Counter()

    @property
    def peak_bytes(self) -> int:
        """Most bytes live since the last reset, scratch included."""
        peak = self._peak_of_storages
        if self.scratch is None:
            return peak
        peak += NUMBER_BYTES
        # Only what may raise the peak is looked up: that may mean to run it.
        for call, live in sorted(self._live_after.items(), key=lambda item: -item[1]):
            if live + self.scratch.bound_bytes(call) > peak:
                peak = max(peak, live + self.scratch.bytes(call))
        return peak

    def in_blocks(self, size: int) -> int:
        """What a storage of so many bytes counts."""
        return -(-size // self.block_bytes) * self.block_bytes

    def holds(self, storage: int) -> bool:
        """Whether a storage that was made inside lives, by its `storage_key`."""
        return storage in self._known

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not take views of these for tensors that were made inside; they live on, uncounted."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def left(self, storage: torch.UntypedStorage) -> None:
        """Do not count a storage any longer, though it lives: it is somewhere else."""
        key = storage._cdata
        if key in self._storages:
            self._elsewhere.add(key)
            self.live_bytes -= self.in_blocks(storage.nbytes())

    def returned(self, storage: torch.UntypedStorage) -> None:
        """Count it again."""
        if storage._cdata in self._elsewhere:
            self._elsewhere.discard(storage._cdata)
            self.live_bytes += self.in_blocks(storage.nbytes())
            self._peak_of_storages = max(self._peak_of_storages, self.live_bytes)

    def took(self, more_bytes: int) -> None:
        """Count what ran without being traced, and has freed again what it took above all that is live."""
        self._peak_of_storages = max(self._peak_of_storages, self.live_bytes + more_bytes)

    def work(self) -> Work:
        """Work since the last reset."""
        return Work(Counter(self.kernels), Counter(self.collectives))

    def sent(self, size: int, messages: int) -> None:
        """Count a collective of imagined ranks."""
        self.collectives[size, messages] += self.repeat

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:  # asked about as often as all else together
            return args[0].fake_device
        kwargs = kwargs or {}
        out = self._call(func, args, kwargs)
        out = as_real(func, args, out, on_cpu=self.scratch is not None)
        outputs = tensors_in(out)
        made = sum([self._track(t) for t in outputs])  # a list: every output must be tracked
        self.kept_number_bytes += KEPT_NUMBER_BYTES * (self.scratch is not None and _keeps_number(func, args))
        about = self._about.get(id(func)) or self._look_up(func)
        if not about.free and (made or about.writes):
            self._count_work(about.flops, args, kwargs, out, outputs)
        if self.scratch is not None and (call := self.scratch.call(func, args)) is not None:
            self._live_after[call] = max(self._live_after.get(call, 0), self.live_bytes)
        return out

    def _track(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = self.in_blocks(storage.nbytes())
        self._known.add(key)
        # A bare reference: weakref.finalize also answers for the end of the process, at ten times the time.
        self._storages[key] = weakref.ref(storage, lambda _: self._freed(key, size))
        self.live_bytes += size
        self._peak_of_storages = max(self._peak_of_storages, self.live_bytes)
        return True

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        del self._storages[key]
        if key in self._elsewhere:
            self._elsewhere.discard(key)
        else:
            self.live_bytes -= size

    def _look_up(self, func: Any) -> _About:
        count = flop_registry.get(func._overloadpacket)
        about = self._about[id(func)] = _About(func, func in _FREE, func._schema.is_mutable, count)
        return about

    def _count_work(
        self,
        count: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        outputs: list[Tensor],
    ) -> None:
        inputs = tensors_in(args)
        if kwargs:
            inputs += tensors_in(tuple(kwargs.values()))
        flops = int(count(*args, **kwargs, out_val=out)) if count else 0
        self.kernels[flops, sum(map(_moved_bytes, (*inputs, *outputs)))] += self.repeat


def _keeps_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether autograd keeps a Python number by which something is scaled: a tensor that no mode sees.

    It lives as long as the operator's node in the graph, which nobody can tell here.
    """
    if func not in _SCALING or not torch.is_grad_enabled():
        return False
    return args[0].requires_grad and isinstance(args[1], int | float)


KEPT_NUMBER_BYTES = 8
_SCALING = {torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor}
_DEVICE = torch.ops.prim.device.default
_FREE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}


def _moved_bytes(tensor: Tensor) -> int:
    # A broadcast operand is read once, whatever its shape says.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
