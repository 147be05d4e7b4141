"""Ways to run attention proper, softmax(q k^T + mask + bias) v, besides the formula itself.

A strategy names one; whoever runs the strategy puts it in force with `using`, and attention asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from model.strategy import EAGER
from model.tiled import tiled_attention

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
    """

    name: str
    attend: Attend
    devices: tuple[str, ...]


def _tiled(size: int, device: str) -> Kernel:
    return Kernel(f"tiled({size}MiB)", partial(tiled_attention, tile_bytes=size * MIB), (device,))


# Tiles of 2 MiB stay in the caches of two or more cores; a GPU wants to be filled.
KERNELS = {kernel.name: kernel for kernel in (_tiled(2, "cpu"), _tiled(64, "cuda"))}

_in_use: ContextVar[Attend | None] = ContextVar("kernel", default=None)


def kernels_for(device: str) -> tuple[str, ...]:
    """Names of the kernels made for that kind of device."""
    return tuple(name for name, kernel in KERNELS.items() if device in kernel.devices)


def kernel(name: str) -> Attend | None:
    """The kernel of that name; None for the formula itself.

    Raises:
        ValueError: there is none; lists what there is.
    """
    if name == EAGER:
        return None
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; there are: {', '.join([EAGER, *KERNELS])}")
    return KERNELS[name].attend


def kernel_in_use() -> Attend | None:
    """What attention is to run with; None: the formula itself."""
    return _in_use.get()


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run attention inside with that kernel."""
    token = _in_use.set(kernel(name))
    try:
        yield
    finally:
        _in_use.reset(token)
