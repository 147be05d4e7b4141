"""What a block calls in turn, as a run without data shows it: who keeps how much, and who may be cut."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from evoplan.cost_model.casting import Casting
from evoplan.cost_model.child_watch import ChildWatch
from evoplan.cost_model.devices import Device
from evoplan.cost_model.fakes import fake_copy, real_tensors_too
from evoplan.cost_model.kept_fits import (
    KeptFits,
    axes_from_text,
    axes_to_text,
    declared_from_text,
    declared_to_text,
)
from evoplan.cost_model.roofline import seconds
from evoplan.cost_model.simulation import simulated
from evoplan.model.adapters import adapter_of
from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.calls import Call
from evoplan.model.foreign.capture import Captured, CaptureError
from evoplan.model.foreign.children import SELF, Axis, Child, Declared
from evoplan.model.foreign.declared import declared
from evoplan.model.foreign.independence import about_axes, independent_axes
from evoplan.model.foreign.sources import told

T = TypeVar("T")


def with_children(
    model: nn.Module,
    captured: Captured,
    device: Device,
    precision: str,
    casting: Casting = nullcontext,
    where: str = "cpu",
    kept: KeptFits | None = None,
) -> Captured:
    """A chain whose calls know which modules they call; equal calls are looked into once.

    Args:
        precision: what products are done in, by the name of a dtype: for times.
        casting: what forward runs under.
        where: what tensors without data claim to be on (see `cost_model.simulation`).
        kept: where axes that were shown before are found.
    """
    known: dict[tuple[object, ...], dict[str, Child]] = {}
    calls = []
    for call in captured.calls:
        module = model.get_submodule(call.path)
        key = signature(call, module)
        if key not in known:
            known[key] = _children_of(call, module, device, precision, casting, where, kept)
        calls.append(replace(call, children=known[key], settings=Settings(module)))
    return replace(captured, calls=tuple(calls))


def signature(call: Call, module: nn.Module) -> tuple[object, ...]:
    """Equal for calls that cost the same, but for what lives beside them."""
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters())
    return call.work, call.arguments, call.results, call.structure, call.reads, call.makes, parameters


def _children_of(
    call: Call,
    module: nn.Module,
    device: Device,
    precision: str,
    casting: Casting,
    where: str,
    kept: KeptFits | None,
) -> dict[str, Child]:
    """By path in the block, in the order of their first calls; itself first."""
    try:
        found = _watched(call, module, device, precision, casting, where)
    except Exception:  # somebody else's code, which may want another device
        if where == "cpu":
            raise
        found = _watched(call, module, device, precision, casting, "cpu")
    return {
        path: replace(child, prove=partial(_axes, inner, kept), compare=partial(_declared, inner, kept))
        for path, child in found.items()
        for inner in [module if path == SELF else module.get_submodule(path)]
    }


def _axes(module: nn.Module, kept: KeptFits | None, child: Child) -> tuple[Axis, ...]:
    return _shown("axes", independent_axes, (axes_to_text, axes_from_text), module, kept, child)


def _declared(module: nn.Module, kept: KeptFits | None, child: Child) -> Declared | None:
    if adapter_of(module) is None:
        return None
    return _shown("declared", declared, (declared_to_text, declared_from_text), module, kept, child)


def _shown(
    name: str,
    show: Callable[[nn.Module, Child], T],
    texts: tuple[Callable[[T], str], Callable[[str], T]],
    module: nn.Module,
    kept: KeptFits | None,
    child: Child,
) -> T:
    """What is shown by running a module, or was before; what draws otherwise than slices can is not run."""
    if kept is None or not child.plain:
        return show(module, child)
    return kept.recall((name, told(module), about_axes(module, child)), partial(show, module, child), *texts)


def _watched(
    call: Call, module: nn.Module, device: Device, precision: str, casting: Casting, where: str
) -> dict[str, Child]:
    with simulated(device, where=where) as trace, real_tensors_too():
        copy = fake_copy(module, where=where)
        others = call.others is not None
        watch = ChildWatch(copy, trace, lambda: seconds(trace.work(), device, precision), others)
        leaves = call.imagined(where)
        for at in call.wanted:
            leaves[at].requires_grad_()
        args, kwargs = call.arguments_from(leaves)
        trace.reset()
        with torch.enable_grad(), casting(), call.others or nullcontext(), watch:
            watch.run(SELF, copy, copy.forward, args, kwargs)
    if watch.wants_more:
        raise CaptureError(
            f"{call.name} reads a tensor that wants a gradient and is neither given to it nor a parameter of "
            "its own: run again it would have none; make it an argument, or a parameter of the block"
        )
    return {
        path: replace(child, plain=child.plain and stays, stays=stays)
        for path, child in watch.found.items()
        for stays in [path not in watch.rewritten]
    }
