"""A model that was written elsewhere with all that a solver needs to know of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.cost_model.calls import calls_table
from evoplan.cost_model.casting import Casting, casting_of
from evoplan.cost_model.children import with_children
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.devices import Device
from evoplan.cost_model.kept_fits import KeptFits
from evoplan.cost_model.knobs import about_knobs, with_knobs
from evoplan.cost_model.measured_calls import MeasuredCalls, no_longer_than_checkpoints
from evoplan.cost_model.static import OPTIMIZER_STATES
from evoplan.model.adapters import adapters_in
from evoplan.model.foreign.as_they_were import left_as_it_is, own_copies
from evoplan.model.foreign.capture import Captured, CaptureError
from evoplan.model.foreign.knobs import Knob, Knobs, declared
from evoplan.model.foreign.rehearsal import given_to_blocks
from evoplan.model.foreign.sources import told
from evoplan.model.running.internals import has_data
from evoplan.model.running.random_state import RandomState
from evoplan.model.running.strategy import Strategy
from evoplan.planner.fitting.by_hand import each_block_again
from evoplan.planner.fitting.capturing import Capturing, in_one_line
from evoplan.planner.fitting.planned_for import device_of
from evoplan.planner.fitting.simulating import Given, Loss, Simulated, Simulator
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import Optimizer
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.schedules.text import schedule_to_json
from evoplan.planner.solvers import Frontier
from evoplan.planner.solvers.confirming import MORE, confirmed

Timing = Literal["predicted", "roofline", "measured"]
WIDE = 1.15  # by so much predicted times may be wrong, where measured ones are to decide

logger = logging.getLogger(__name__)


@dataclass
class Fitting:
    """A model, what it is called with, and what its blocks cost.

    Attributes:
        own_device: the same where the device table does not have it.
        precision: of products; a dtype by name, or how it is mixed.
        times: where times come from: the roofline, one calibrated on this machine, or measured.
        where: what tensors without data are on, meta or (made fake) cpu.
        kept: what was found of the model before.
    """

    model: nn.Module
    given: Given
    loss: Loss
    optimizer: Optimizer
    device: Device
    own_device: Device | None
    precision: str
    times: str
    where: str
    autocast: torch.dtype | None
    casting: Casting
    captured: Captured
    table: CostTable
    kept: KeptFits
    _known: dict[Sequence, Prediction] = field(default_factory=dict, repr=False)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Their calls by name, in order."""
        return tuple(call.name for call in self.captured.calls)

    @property
    def said_precision(self) -> str:
        """As plans have it: a dtype, or that of mixed products."""
        return self.precision if self.autocast is None else f"{self.precision} mixed"

    @cached_property
    def frontier(self) -> Frontier:
        """Fastest schedules of the blocks, by the memory that is left for them."""
        return Frontier(self.table)

    @cached_property
    def static(self) -> dict[str, int]:
        """What is there before the step, in bytes."""
        simulated = self._simulated(each_block_again(self.table))
        states = OPTIMIZER_STATES[self.optimizer] * simulated.static["gradients"]
        return {**simulated.static, "optimizer": states, "workspace": self.device.workspace_bytes}

    def autocasting(self, kind: str) -> AbstractContextManager[object]:
        """What forward runs under, on tensors with data."""
        return nullcontext() if self.autocast is None else torch.autocast(kind, self.autocast)

    @cached_property
    def _simulator(self) -> Simulator:
        about = self.captured, self.table, self.device, self.loss, self.casting, self.precision, self.where
        return Simulator(self.model, self.given, *about)

    def learn_of_the_loss(self) -> None:
        """Have the table say what the loss takes, with all that lies between it and the blocks."""
        schedule = each_block_again(self.table)
        loss_bytes = self._simulated(schedule).loss_bytes(schedule, self.table)
        self.table = replace(self.table, loss_bytes=loss_bytes)

    def _simulated(self, schedule: Sequence) -> Simulated:
        return self.kept.recall(
            (*self._about_steps, str(schedule_to_json(schedule))),
            lambda: self._step(schedule),
            lambda simulated: json.dumps(asdict(simulated)),
            lambda text: Simulated(**json.loads(text)),
        )

    def _step(self, schedule: Sequence) -> Simulated:
        what = "cannot run around its blocks without data, nor read what they leave in attributes"
        with in_one_line(f"{type(self.model).__name__} {what}"), RandomState():
            return self._simulator.step(schedule)

    @cached_property
    def _about_steps(self) -> tuple[str | None, ...]:
        """What the memory of a step follows from, beside the schedule."""
        specs = [(name, p.shape, p.dtype, p.requires_grad) for name, p in self.model.named_parameters()]
        digests = self.captured.operators, self.captured.digest
        knobs = [about_knobs(call) for call in self.captured.calls]
        of_knobs = None if None in knobs else repr(knobs)
        return "step", told(self.model), *digests, repr(self.given), repr(specs), of_knobs

    def predict(self, schedule: Sequence) -> Prediction:
        """Of the whole step, by simulation."""
        if schedule not in self._known:
            simulated = self._simulated(schedule)
            static = sum(self.static.values())
            peak = simulated.peak_bytes + self.static["optimizer"] + self.static["workspace"]
            self._known[schedule] = Prediction(
                peak_bytes=peak,
                static_bytes=static,
                activation_bytes=peak - static,
                step_seconds=replay(schedule, self.table).seconds + simulated.other_seconds,
            )
        return self._known[schedule]


def fitting_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Loss,
    optimizer: Optimizer,
    autocast: torch.dtype | None,
    named: str | Device | None,
    knobs: Knobs | None = None,
    timing: Timing = "predicted",
    strategies: Collection[Strategy] = (),
) -> Fitting:
    """Capture a model and trace its blocks.

    Args:
        named: the device to plan for, or its name or file; where the model lies if not given.
        knobs, timing: as `fit` has them.
        strategies: that must be there, whatever is better.

    Raises:
        CaptureError: it cannot be planned; says why.
    """
    becoming: set[nn.Module] = set()
    with left_as_it_is(model, becoming):
        about = loss, optimizer, autocast, named, declared(knobs), timing, strategies
        return _fitting_of(model, args, kwargs, *about, becoming)


def _fitting_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Loss,
    optimizer: Optimizer,
    autocast: torch.dtype | None,
    named: str | Device | None,
    of_blocks_own: tuple[Knob, ...],
    timing: Timing,
    strategies: Collection[Strategy],
    becoming: set[nn.Module],
) -> Fitting:
    """The same, on a model that is put back, but for modules that have become what they stay."""
    parameters = list(model.parameters())
    if not parameters:
        raise CaptureError(f"{type(model).__name__} has no parameters: there is nothing to train")
    kinds = {p.device.type for p in parameters}
    if len(kinds) > 1 or not kinds <= {"cpu", "cuda", "meta"}:
        raise CaptureError(f"the model lies on {', '.join(sorted(kinds))}; have it on the CPU or on one GPU")
    (kind,) = kinds
    dtype = _name(autocast or _widest(model))
    where, times, own = device_of(kind, dtype, named, timing == "roofline")
    casting = casting_of(where.kind, None if autocast is None else dtype)
    given = Given.of(args, kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    has_numbers = all(map(has_data, (*leaves, *parameters)))
    if timing == "measured" and (not has_numbers or named not in (None, kind)):
        raise CaptureError(
            "times are measured where the model and its inputs lie: have both, and leave the device out"
        )
    outside = partial(torch.autocast, kind, autocast) if autocast else nullcontext

    def run() -> Any:
        own_args, own_kwargs = own_copies((args, kwargs))
        with outside():
            return model(*own_args, **own_kwargs)

    about_chain = model, given, where, loss, casting, autocast, run if has_numbers else None, becoming
    chain, place = Capturing(*about_chain).chain()
    # The blocks alone may do without data where the model around them does not.
    of_blocks = "cpu" if chain.unlike_on_meta or autocast else "meta"
    # What an adapter says is code and data; either may be another's by the next time.
    adapters = adapters_in(model)
    sources = loss, Simulator, *(part for adapter in adapters for part in (adapter.call, adapter.make))
    layers = [(adapter.name, sorted(adapter.layers.items())) for adapter in adapters]
    kept = KeptFits(model, sources, (where, dtype, autocast, place, of_blocks, layers))
    with in_one_line(f"the blocks of {type(model).__name__} do not run by themselves without data"):
        chain = with_children(model, chain, where, dtype, casting, of_blocks, kept)
    chain = with_knobs(model, chain, of_blocks_own, kept)
    slack = WIDE if timing == "measured" else 1.0
    table = calls_table(model, chain, where, dtype, casting, of_blocks, kept, strategies, slack)
    if timing == "measured":
        given_to = given_to_blocks(model, chain, run)
        calls, times = MeasuredCalls(model, chain, given_to, outside), timing
        table, _ = confirmed(calls.table(table), partial(calls.timed, more=MORE))
        table = no_longer_than_checkpoints(table)
    about = where, own, dtype, times, place, autocast, casting
    fitting = Fitting(model, given, loss, optimizer, *about, chain, table, kept)
    fitting.learn_of_the_loss()
    return fitting


def autocast_in_force(model: nn.Module) -> torch.dtype | None:
    """What torch.autocast casts to where the caller stands; None outside of it."""
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if kind == "meta":
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _widest(model: nn.Module) -> torch.dtype:
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(floating, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
