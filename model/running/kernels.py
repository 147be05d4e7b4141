"""Ways to run attention proper, softmax(q k^T + mask + bias) v, besides the formula itself.

A strategy names one; whoever runs the strategy puts it in force with `using`, and attention asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from evoplan.model.running.fused import (
    KernelError,
    cuequivariance_attention,
    deepspeed_attention,
    sdpa_attention,
)
from evoplan.model.running.internals import has_data
from evoplan.model.running.strategy import COMPILED, EAGER, Strategy
from evoplan.model.running.tiled import tiled_attention

MIB = 2**20

# (q, k, v [*, rows, heads, n, c], mask [*, rows, n], bias [*, heads, n, n] or None) -> as q
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Kernel:
    """One way to run attention.

    Attributes:
        name: in a strategy, after the plus.
        attend: exact, and differentiable in q, k, v and the bias.
        devices: kinds of devices that it is made for, cpu and cuda.
        opaque: what it allocates cannot be traced, so that plans use it only where it was measured.
        needs: module that has to be installed.
    """

    name: str
    attend: Attend
    devices: tuple[str, ...]
    opaque: bool = False
    needs: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot be used here, in a few words; None: it can."""
        if self.needs is None or find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed"


def _tiled(size: int, device: str) -> Kernel:
    return Kernel(f"tiled({size}MiB)", partial(tiled_attention, tile_bytes=size * MIB), (device,))


# Tiles of 2 MiB stay in the caches of two or more cores; a GPU wants to be filled.
_ALL = (
    _tiled(2, "cpu"),
    _tiled(64, "cuda"),
    Kernel("sdpa", sdpa_attention, ("cpu", "cuda"), opaque=True),
    Kernel("cuequivariance", cuequivariance_attention, ("cuda",), opaque=True, needs="cuequivariance_torch"),
    Kernel("deepspeed", deepspeed_attention, ("cuda",), opaque=True, needs="deepspeed"),
)
KERNELS = {kernel.name: kernel for kernel in _ALL}

_in_use: ContextVar[Attend | None] = ContextVar("kernel", default=None)


def kernels_for(device: str, opaque: bool = False) -> tuple[str, ...]:
    """Names of the kernels made for that kind of device: those that can be traced, or those that cannot."""
    return tuple(
        name for name, kernel in KERNELS.items() if device in kernel.devices and kernel.opaque == opaque
    )


def is_opaque(strategy: Strategy) -> bool:
    """Whether what a strategy allocates cannot be traced."""
    return strategy.kernel == COMPILED or (strategy.kernel in KERNELS and KERNELS[strategy.kernel].opaque)


def kernel(name: str) -> Attend | None:
    """The kernel of that name; None for the formula itself.

    Raises:
        ValueError: there is none; lists what there is.
    """
    if name in (EAGER, COMPILED):
        return None
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; there are: {', '.join([EAGER, COMPILED, *KERNELS])}")
    missing = KERNELS[name].missing
    if missing:
        raise KernelError(f"kernel {name} cannot be used here: {missing}")
    found = KERNELS[name]
    return partial(_or_stand_in, found.attend) if found.opaque else found.attend


def _or_stand_in(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None
) -> Tensor:
    """The kernel; on tensors without data, which it cannot run on, one that keeps as much."""
    if not has_data(q):
        return tiled_attention(q, k, v, mask, bias, 2 * MIB)
    return attend(q, k, v, mask, bias)


def kernel_in_use() -> Attend | None:
    """What attention is to run with; None: the formula itself."""
    return None if torch.compiler.is_compiling() else _in_use.get()


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run attention inside with that kernel."""
    token = _in_use.set(kernel(name))
    try:
        yield
    finally:
        _in_use.reset(token)
