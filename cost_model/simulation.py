"""Code run on tensors without data, and what it would take on a device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, overload

from evoplan.cost_model.devices import Device
from evoplan.cost_model.fakes import fake_tensors
from evoplan.cost_model.meta_calls import MetaCalls
from evoplan.cost_model.results import as_real
from evoplan.cost_model.scratch import CpuScratch
from evoplan.cost_model.trace import Operator, Trace
from evoplan.model.running.internals import parametrizations_made_anew
from evoplan.model.running.pieces import sampled_pieces

_CALLS = MetaCalls()  # of all traces of this process

SomeTrace = TypeVar("SomeTrace", bound=Trace)


@overload
def simulated(device: Device | None = None, *, where: str = "cpu") -> AbstractContextManager[Trace]: ...


@overload
def simulated(
    device: Device | None, kind: type[SomeTrace], where: str = "cpu"
) -> AbstractContextManager[SomeTrace]: ...


def simulated(
    device: Device | None = None, kind: type[Trace] = Trace, where: str = "cpu"
) -> AbstractContextManager[Trace]:
    """Inside, tensors have no data, of pieces one of each kind is run, and the trace counts what lives.

    Args:
        device: whose blocks and whose operators' scratch count; None: bytes alone.
        kind: of trace.
        where: what tensors claim to be on: cpu, made fake; or meta, where the code names that device itself.
    """
    return _simulated(device, kind, where)


@contextmanager
def imagined(device: Device, where: str = "cpu") -> Iterator[Operator]:
    """Inside, tensors have no data, and nothing is counted.

    Args:
        device, where: as `simulated` has them.

    Yields:
        What runs an operator on its arguments.
    """
    on_cpu = device.kind == "cpu"

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return as_real(func, args, _CALLS(func, args, kwargs), on_cpu)

    with garbage_left(), fake_tensors() if where == "cpu" else nullcontext():
        yield call


@contextmanager
def _simulated(device: Device | None, kind: type[SomeTrace], where: str) -> Iterator[SomeTrace]:
    blocks = 1 if device is None else device.block_bytes
    scratch = CpuScratch() if device is not None and device.kind == "cpu" else None
    with (
        garbage_left(),
        parametrizations_made_anew(),
        fake_tensors() if where == "cpu" else nullcontext(),
        kind(blocks, scratch, _CALLS) as trace,
        sampled_pieces(trace),
    ):
        yield trace


@contextmanager
def garbage_left() -> Iterator[None]:
    """Garbage is not looked for: runs make many objects, and what dies here dies by its last reference."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
