"""What a call of a block that somebody else wrote costs under each strategy, traced as submodules are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from evoplan.cost_model.as_written import AutogradsRun, Entered
from evoplan.cost_model.call_times import needed, timed
from evoplan.cost_model.casting import Casting
from evoplan.cost_model.children import signature
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.devices import Device
from evoplan.cost_model.fakes import fake_copy, real_tensors_too
from evoplan.cost_model.kept_fits import KeptFits, costs_from_text, costs_to_text
from evoplan.cost_model.knobs import about_knobs
from evoplan.cost_model.liveness import Liveness
from evoplan.cost_model.menus import strategies_of
from evoplan.cost_model.simulation import simulated
from evoplan.cost_model.steps import AsWritten, StepCost
from evoplan.cost_model.trace import Trace, Work
from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.calls import Call, Made
from evoplan.model.foreign.capture import Captured, CaptureError
from evoplan.model.foreign.inside import Inside, in_autograds_graph
from evoplan.model.foreign.leaves import Layout
from evoplan.model.foreign.runs import CallRun, discarded
from evoplan.model.foreign.sources import told
from evoplan.model.running.internals import storage_key
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.strategy import REDO, Strategy


def calls_table(
    model: nn.Module,
    captured: Captured,
    device: Device,
    precision: str,
    casting: Casting = nullcontext,
    where: str = "cpu",
    kept: KeptFits | None = None,
    also: Collection[Strategy] = (),
    slack: float = 1.0,
) -> CostTable:
    """Costs of every call of a model under every strategy that it offers; equal calls are traced once.

    Those that another one is better than are left out.

    Args:
        precision: what products are done in, by the name of a dtype: for times.
        casting: what forward runs under.
        where: what tensors without data claim to be on (see `cost_model.simulation`).
        kept: where costs that were traced before are found.
        also: strategies that stay, whatever is better.
        slack: of times that another one has to be better by.
    """
    calls = captured.calls
    liveness = liveness_of(captured)
    layouts: dict[str, Layout | None] = {}  # of what gradients are found of
    state_bytes: dict[str, int] = {}
    known: dict[tuple[object, ...], tuple[StepCost, ...]] = {}
    options = []
    for call in calls:
        for name, made in zip(call.makes, call.made, strict=True):
            layouts[name] = made.layout if made.differentiable else None
            nbytes = device.in_blocks(made.state_bytes)
            state_bytes[name] = max(nbytes, state_bytes.get(name, 0))
        alive = {version.tensor: layouts[version.tensor] for version in liveness.alive(call.index + 1)}
        live = {name: layout for name, layout in alive.items() if layout is not None}
        module = model.get_submodule(call.path)
        key = signature(call, module), repr(live)
        if key not in known:
            trace = partial(_traced, call, module, live, device, casting, where)
            found = _recalled(call, module, repr(key), trace, kept)
            known[key] = needed([timed(cost, device, precision) for cost in found], also, slack)
        options.append(known[key])
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


def _recalled(
    call: Call, module: nn.Module, about: str, trace: Callable[[], list[StepCost]], kept: KeptFits | None
) -> list[StepCost]:
    if kept is None:
        return trace()
    children = repr(
        [(path, child.stays, child.draws, child.changes) for path, child in call.children.items()]
    )
    knobs = about_knobs(call)
    about_costs = "costs", told(module), about, children, knobs
    return kept.recall(about_costs, trace, costs_to_text, costs_from_text)


def discarding(strategy: Strategy) -> Strategy:
    """That which keeps nothing by the same run: only slices and knobs make it another one."""
    within = tuple((path, way) for path, way in strategy.within if way != REDO)
    return Strategy(WHOLE.kind, within=within)


def liveness_of(captured: Captured) -> Liveness:
    """Who holds which version of the state."""
    calls = captured.calls
    return Liveness([call.reads for call in calls], captured.outputs, [call.makes for call in calls])


def _traced(
    call: Call,
    module: nn.Module,
    live: Mapping[str, Layout],
    device: Device,
    casting: Casting,
    where: str,
) -> list[StepCost]:
    # For which modules may be run on real tensors.
    offered = strategies_of(call.children, call.turned, device.kind)
    try:
        with simulated(device, where=where) as trace, real_tensors_too():
            tracing = CallTracing(call, fake_copy(module, where=where), live, trace, casting, where)
            return [tracing.cost(strategy) for strategy in offered]
    except CaptureError:
        raise
    except Exception as error:  # somebody else's code, which may want another device
        if where == "cpu":
            said = str(error).partition("\n")[0][:300]
            raise CaptureError(
                f"{call.name} cannot be run without data, or not again ({type(error).__name__}: {said})"
            ) from None
    return _traced(call, module, live, device, casting, "cpu")


class CallTracing:
    """Costs of one call, without times; make and use it on tensors without data, inside `trace`.

    Args:
        live: of the state tensors that have a gradient when its backward begins.
    """

    def __init__(
        self,
        call: Call,
        module: nn.Module,
        live: Mapping[str, Layout],
        trace: Trace,
        casting: Casting = nullcontext,
        where: str = "cpu",
    ) -> None:
        self.call, self.module, self.live, self.trace = call, module, live, trace
        self.casting, self.where, self.settings = casting, where, Settings(module)
        self.leaves = call.imagined(where)
        self._discards: dict[Strategy, tuple[int, Work]] = {}

    def _discarded(self, strategy: Strategy) -> tuple[int, Work]:
        """A run that keeps nothing: its peak and its work."""
        return self._discarded_so(discarding(strategy))

    def _discarded_so(self, strategy: Strategy) -> tuple[int, Work]:
        if strategy in self._discards:
            return self._discards[strategy]
        base = self.trace.live_bytes
        self.trace.reset()
        with torch.no_grad(), self.casting(), self.call.others or nullcontext():
            discarded(self.call, self.module.forward, self.leaves, self._inside(strategy))
        found = self._discards[strategy] = self.trace.peak_bytes - base, self.trace.work()
        return found

    def _inside(self, strategy: Strategy) -> Inside:
        return Inside(strategy, self.module, self.call.children, self.settings, self.call.knobs)

    def cost(self, strategy: Strategy) -> StepCost:
        """Its cost under one strategy."""
        cost = self._recorded(strategy)
        held = self._recorded(strategy, held=True).backward_bytes if cost.keeps_made else 0
        written = None
        if in_autograds_graph(strategy):
            written = self._written(strategy, bool(cost.keeps_made))
        return replace(cost, backward_held_bytes=held, as_written=written)

    def _written(self, strategy: Strategy, keeps_made: bool) -> AsWritten:
        """The same in autograd's own graph."""
        for parameter in self.module.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        entered = Entered()
        first = self._recorded(strategy, as_written=entered)
        held = self._recorded(strategy, held=True, as_written=entered) if keeps_made else None
        for parameter in self.module.parameters():
            parameter.grad = None
        keeps = tuple(at for at, nbytes in entered.kept.items() if nbytes)
        return AsWritten(first.backward_bytes, held.backward_bytes if held else 0, keeps)

    def _recorded(
        self, strategy: Strategy, held: bool = False, as_written: Entered | None = None
    ) -> StepCost:
        """A recorded run and its backward.

        Args:
            held: whether others hold what it makes, above which the backward counts then.
            as_written: it runs in autograd's own graph; is told which arguments are held.
        """
        call, trace, base = self.call, self.trace, self.trace.live_bytes
        discard_bytes, discard_work = self._discarded(strategy)
        inside, parameters = self._inside(strategy), Parameters(self.module)
        trace.reset()
        with self.casting(), call.others or nullcontext():
            about = call, self.module.forward, self.leaves, call.wanted, parameters, inside
            run = CallRun(*about) if as_written is None else AutogradsRun(*about, as_written)
        number_bytes = trace.kept_number_bytes
        made, returned = run.take()
        forward_bytes, forward_work = trace.peak_bytes - base + number_bytes, trace.work()
        storages = [(storage_key(t), trace.in_blocks(t.untyped_storage().nbytes())) for t in made]
        others = made if held else ()
        del made, returned
        keeps = tuple(
            at
            for at, (storage, _) in enumerate(storages)
            if trace.holds(storage) and call.made[at].within is None and call.made[at].own is None
        )
        # Tensors of the state count once, however many hold them.
        of_state = sum({storages[at][0]: storages[at][1] for at in keeps}.values())
        preserved_bytes = trace.live_bytes - base + number_bytes - of_state

        given_bytes = 0 if as_written is None else as_written.look(trace)
        grads = [_gradient(made, self.where) for made in call.made if as_written is None]
        more = [layout.gradient(self.where) for name, layout in self.live.items() if name not in call.makes]
        trace.reset()
        found = run.vjp(grads)
        backward_bytes = trace.peak_bytes - base + number_bytes - (of_state if held else 0) - given_bytes
        backward_work = trace.work()
        del run, found, grads, more, others
        if trace.live_bytes != base:
            raise CaptureError(
                f"{call.name}, or a hook in it, keeps tensors when it has run; they would be cut off from "
                "the rest of the graph: have it return them, and modules keep what functions do by lru_cache"
            )
        of_bytes = forward_bytes, preserved_bytes, backward_bytes, discard_bytes
        works = discard_work, forward_work, backward_work
        return StepCost(strategy, *of_bytes, *works, keeps_made=keeps)


def _gradient(made: Made, where: str) -> Tensor | None:
    """Of what a call makes, as backward finds it."""
    return made.layout.gradient(where) if made.differentiable else None
