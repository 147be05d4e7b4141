"""What a call of a block that somebody else wrote costs under each strategy, traced as submodules are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from evoplan.cost_model.casting import Casting
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.devices import Device
from evoplan.cost_model.liveness import Liveness
from evoplan.cost_model.roofline import seconds
from evoplan.cost_model.simulation import simulated
from evoplan.cost_model.steps import StepCost
from evoplan.cost_model.trace import Trace, Work, fake_copy
from evoplan.model.foreign.calls import Call, Layout, Value
from evoplan.model.foreign.capture import Captured
from evoplan.model.foreign.runs import CallRun, discarded, keeping, levels_of
from evoplan.model.running.internals import storage_key
from evoplan.model.running.kinds import REDOS, WHOLE
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.strategy import Strategy


def calls_table(
    model: nn.Module, captured: Captured, device: Device, precision: str, casting: Casting = nullcontext
) -> CostTable:
    """Costs of every call of a model under every strategy that it offers; equal calls are traced once.

    Args:
        precision: what products are done in, by the name of a dtype: for times.
        casting: what forward runs under.
    """
    calls = captured.calls
    liveness = liveness_of(captured)
    layouts: dict[str, Layout] = {}
    known: dict[tuple[object, ...], tuple[StepCost, ...]] = {}
    options = []
    for call in calls:
        layouts |= dict(zip(call.makes, (made.layout for made in call.made), strict=True))
        live = {version.tensor: layouts[version.tensor] for version in liveness.alive(call.index + 1)}
        module = model.get_submodule(call.path)
        key = _signature(call, module), repr(live)
        if key not in known:
            found = _traced(call, module, live, device, casting)
            known[key] = tuple(_timed(cost, device, precision) for cost in found)
        options.append(known[key])
    state_bytes = {name: device.in_blocks(layout.nbytes) for name, layout in layouts.items()}
    return CostTable(
        options=tuple(options),
        step_reads=tuple(call.reads for call in calls),
        groups=tuple(range(index, index + 1) for index in range(len(calls))),
        state_bytes=state_bytes,
        loss_bytes=sum(state_bytes[name] for name in captured.outputs),
        training=True,
        outputs=captured.outputs,
        step_makes=tuple(call.makes for call in calls),
    )


def liveness_of(captured: Captured) -> Liveness:
    """Who holds which version of the state."""
    calls = captured.calls
    return Liveness([call.reads for call in calls], captured.outputs, [call.makes for call in calls])


def _signature(call: Call, module: nn.Module) -> tuple[object, ...]:
    """Equal for calls that cost the same."""
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters())
    return call.work, call.arguments, call.results, call.structure, call.reads, call.makes, parameters


def strategies_of(call: Call, module: nn.Module) -> list[Strategy]:
    """What a call can run under. Children that change their buffers are not run again one by one."""
    offered, before = [WHOLE], 0
    for strategy in () if call.changes else REDOS:
        count = levels_of(module, strategy.way.recomputed_depth)
        if count > before:
            offered.append(strategy)
        before = count
    return offered


def _timed(cost: StepCost, device: Device, precision: str) -> StepCost:
    return replace(
        cost,
        discard_seconds=seconds(cost.discard_work, device, precision),
        forward_seconds=seconds(cost.forward_work, device, precision),
        backward_seconds=seconds(cost.backward_work, device, precision),
    )


def _traced(
    call: Call, module: nn.Module, live: Mapping[str, Layout], device: Device, casting: Casting
) -> list[StepCost]:
    with simulated(device) as trace:
        copy = fake_copy(module)
        leaves = [
            argument.value if isinstance(argument, Value) else argument.layout.empty()
            for argument in call.arguments
        ]
        return [
            trace_call(call, copy, leaves, strategy, live, trace, casting)
            for strategy in strategies_of(call, module)
        ]


def trace_call(
    call: Call,
    module: nn.Module,
    leaves: Sequence[object],
    strategy: Strategy,
    live: Mapping[str, Layout],
    trace: Trace,
    casting: Casting = nullcontext,
) -> StepCost:
    """Cost of one call under one strategy, without times; call on tensors without data, inside `trace`.

    Args:
        leaves: of its arguments.
        live: of the state tensors that have a gradient when its backward begins.
    """
    base = trace.live_bytes
    trace.reset()
    with torch.no_grad(), casting():
        ran = discarded(call, module.forward, leaves)
    discard_bytes, discard_work = trace.peak_bytes - base, trace.work()
    del ran

    forward_bytes, preserved_bytes, backward_bytes, keeps, forward_work, backward_work = _recorded(
        call, module, leaves, strategy, live, trace, casting
    )
    held_bytes = 0
    if keeps:
        _, _, held_bytes, *_ = _recorded(call, module, leaves, strategy, live, trace, casting, held=True)
    of_bytes = forward_bytes, preserved_bytes, backward_bytes, discard_bytes
    works = discard_work, forward_work, backward_work
    return StepCost(strategy, *of_bytes, *works, keeps_made=keeps, backward_held_bytes=held_bytes)


def _recorded(
    call: Call,
    module: nn.Module,
    leaves: Sequence[object],
    strategy: Strategy,
    live: Mapping[str, Layout],
    trace: Trace,
    casting: Casting,
    held: bool = False,
) -> tuple[int, int, int, tuple[int, ...], Work, Work]:
    """Peak of a recorded forward, what it preserves, peak of its backward, what it keeps of what it makes.

    Args:
        held: whether others hold what it makes; the backward's peak is above that then.
    """
    base = trace.live_bytes
    trace.reset()
    with casting():
        run = CallRun(
            call, module.forward, leaves, call.wanted, Parameters(module), keeping(strategy, module)
        )
    number_bytes = trace.kept_number_bytes
    made, returned = run.take()
    forward_bytes, forward_work = trace.peak_bytes - base + number_bytes, trace.work()
    storages = [(storage_key(tensor), trace.in_blocks(tensor.untyped_storage().nbytes())) for tensor in made]
    others = made if held else ()
    del made, returned
    keeps = () if held else tuple(at for at, (storage, _) in enumerate(storages) if trace.holds(storage))
    # Tensors of the state count once, however many hold them.
    of_state = sum(size for at, (_, size) in enumerate(storages) if held or at in keeps)
    preserved_bytes = trace.live_bytes - base + number_bytes - of_state

    grads = gradients_of(call)
    more = [layout.empty() for name, layout in live.items() if name not in call.makes]
    trace.reset()
    found = run.vjp(grads)
    backward_bytes = trace.peak_bytes - base + number_bytes - (of_state if held else 0)
    backward_work = trace.work()
    del run, found, grads, more, others
    assert trace.live_bytes == base, f"{call.name} under {strategy} leaves tensors behind"
    return forward_bytes, preserved_bytes, backward_bytes, keeps, forward_work, backward_work


def gradients_of(call: Call) -> list[Tensor | None]:
    """Gradients of all that it makes, as backward finds them."""
    return [
        torch.empty(made.layout.shape, dtype=made.layout.dtype) if made.differentiable else None
        for made in call.made
    ]
