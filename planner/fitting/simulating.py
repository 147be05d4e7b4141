"""A training step of a model under a plan, on tensors without data: the memory of all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.cost_model.casting import Casting
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.devices import Device
from evoplan.cost_model.fakes import fake_copy, real_tensors_too, unseen
from evoplan.cost_model.roofline import seconds
from evoplan.cost_model.simulation import imagined, simulated
from evoplan.cost_model.steps import LOSS_NUMBERS, NUMBER_BYTES
from evoplan.cost_model.trace import Trace, Work
from evoplan.model.foreign.as_they_were import own_objects
from evoplan.model.foreign.calls import Call
from evoplan.model.foreign.capture import Captured, CaptureError, capture
from evoplan.model.foreign.leaves import Layout
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.internals import leaves_of, storage_key, without_hooks
from evoplan.model.running.random_state import OtherState
from evoplan.planner.fitting.ghosts import GhostRuns
from evoplan.planner.fitting.met import Planned
from evoplan.planner.fitting.patched import Patched
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence

Loss = Callable[[Any], Tensor]


def mean_of_squares(output: Any) -> Tensor:
    """Of all floating tensors in what a model returns."""
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    trained = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.requires_grad]
    if not trained:
        raise CaptureError(
            "the model returns no real tensor that wants a gradient; train some of it, or give `loss`"
        )
    return mean_square(*trained)


@dataclass(frozen=True)
class Given:
    """What a model is called with, without its data.

    Attributes:
        args, kwargs: a `Layout` and whether it requires a gradient in place of each tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        """That of a call."""
        return cls(*pytree.tree_map_only(Tensor, _told, (tuple(args), dict(kwargs))))

    def made(self, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tensors of these layouts."""
        given = own_objects((self.args, self.kwargs))
        args, kwargs = pytree.tree_map_only(_Told, lambda told: told.empty(where), given)
        return args, kwargs


@dataclass(frozen=True)
class _Told:
    layout: Layout
    requires_grad: bool

    def empty(self, where: str) -> Tensor:
        return self.layout.empty(where).requires_grad_(self.requires_grad)


def _told(tensor: Tensor) -> _Told:
    return _Told(Layout.of(tensor), tensor.requires_grad)


def captured(
    model: nn.Module,
    given: Given,
    device: Device,
    loss: Loss | None = None,
    casting: Casting = nullcontext,
    where: str = "cpu",
) -> Captured:
    """The chain of a model, on a copy without data."""
    loss = loss or mean_of_squares

    def chain(others: bool) -> Captured:
        with imagined(device, where) as call, real_tensors_too():
            copy = fake_copy(model, where=where)
            args, kwargs = given.made(where)
            with casting():
                return capture(copy, lambda: _scalar(loss(copy(*args, **kwargs))), call, others)

    state = OtherState()
    found = chain(others=False)
    if state.moved():
        with state:  # who draws takes a while to find out; the same is drawn
            found = chain(others=True)
    made = [made.layout for call in found.calls for made in call.made]
    if not any(layout.numel for layout in made):
        raise CaptureError(
            f"what the blocks make has no numbers ({made[0]}); give inputs that are 0 long in no dimension"
        )
    return found


def _scalar(value: Any) -> Tensor:
    """A loss, if backward can begin there."""
    if not isinstance(value, Tensor):
        found = f"is of class {type(value).__name__}"
    elif value.numel() != 1 or value.is_complex():
        found = f"is {Layout.of(value)}"
    elif not value.requires_grad:
        found = "wants no gradient"
    else:
        return value
    raise CaptureError(f"the loss {found}; have it return one real number, of which gradients can be found")


@dataclass(frozen=True)
class Simulated:
    """Bytes of a training step.

    Attributes:
        peak_bytes: the most that is live, parameters, their gradients, buffers and inputs included.
        static: of that, what is there before the step.
        other_seconds: predicted time of all that is not in the blocks.
        loss_peak_bytes: the most that is live after the last block has run and before one runs backward.
        backward_peak_bytes: the most that is live from there on.
    """

    peak_bytes: int
    static: dict[str, int]
    other_seconds: float
    loss_peak_bytes: int
    backward_peak_bytes: int

    def loss_bytes(self, schedule: Sequence, table: CostTable) -> int:
        """What is live at the loss above what blocks under this schedule hold there, as the table has it.

        What is around the blocks all the while, such as the output, is not in it: solvers leave that out.
        """
        moments = replay(schedule, table).moments
        (at,) = (at for at, moment in enumerate(moments) if moment.phase == "loss")
        around = self.backward_peak_bytes - max(moment.peak_bytes for moment in moments[at + 1 :])
        return max(table.loss_bytes, self.loss_peak_bytes - around - moments[at].held_bytes)


class Simulator:
    """Training steps of a model under one schedule or another: a forward, the loss and a backward.

    Args:
        precision: what products are done in, for times.
        where: what tensors without data are on (see `cost_model.simulation`).
    """

    def __init__(
        self,
        model: nn.Module,
        given: Given,
        captured: Captured,
        table: CostTable,
        device: Device,
        loss: Loss = mean_of_squares,
        casting: Casting = nullcontext,
        precision: str = "float32",
        where: str = "cpu",
    ) -> None:
        self.model, self.given, self.captured, self.table = model, given, captured, table
        self.device, self.loss, self.casting = device, loss, casting
        self.precision, self.where = precision, where
        # Fake tensors belong to one simulation; those of the meta device serve for all.
        self._copy = fake_copy(model, where=where) if where == "meta" else None

    def step(self, schedule: Sequence) -> Simulated:
        """One under a schedule, all parameters' gradients being allocated."""
        with simulated(self.device, where=self.where) as trace, real_tensors_too():
            copy = self._copy or fake_copy(self.model, where=self.where)
            own = [*copy.parameters(), *copy.buffers()]
            trace.leave_out(own)
            sizes = {storage_key(t): trace.in_blocks(t.untyped_storage().nbytes()) for t in own}
            base = trace.live_bytes
            for parameter in copy.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            gradients = trace.live_bytes - base
            args, kwargs = self.given.made(self.where)
            inputs = trace.live_bytes - base - gradients
            static = {"parameters": sum(sizes.values()), "gradients": gradients, "inputs": inputs}
            phases = _Phases(trace)
            about = self.captured.calls, self.table, trace, self.where, phases.passed
            patched = Patched(copy, self.captured, schedule, runs=partial(_ghosts, *about))
            patched.install()
            trace.reset()
            try:
                with self.casting():  # backward outside, as torch has it
                    output = copy(*args, **kwargs)
                    value = self.loss(output)
                known = [*own, *pytree.tree_leaves((args, kwargs))]
                with _as_they_were(leaves_of(value), known, trace):
                    value.backward()
            finally:
                patched.remove()
            phases.passed("backward")
            # The numbers that the loss is, and those by which something outside of the blocks is scaled.
            more = LOSS_NUMBERS * self.device.in_blocks(NUMBER_BYTES) + phases.number_bytes
            more += static["parameters"] - base
            peaks = {name: peak + more for name, peak in phases.peaks.items()}
            took = sum(seconds(work, self.device, self.precision) for work in phases.work)
            backward = peaks["backward"]
            loss = peaks.get("loss", backward)
            return Simulated(max(peaks.values()), static, took, loss, backward)


@contextmanager
def _as_they_were(leaves: Iterable[Tensor], known: Iterable[Any], trace: Trace) -> Iterator[None]:
    """Leaves that are not among those known are somebody else's, with data: a head in the loss, say.

    Gradients are added to others that nobody counts, as to those of parameters; their hooks do not run. Those
    that the model has made itself (a hook may have cut its graph there) are left to it.
    """
    known = set(map(id, known))
    others = {
        leaf: leaf.grad for leaf in leaves if id(leaf) not in known and not trace.holds(storage_key(leaf))
    }
    try:
        with unseen():
            for leaf in others:
                leaf.grad = torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        trace.leave_out(leaf.grad for leaf in others if leaf.grad is not None)
        with without_hooks(others):
            yield
    finally:
        for leaf, grad in others.items():
            leaf.grad = grad


class _Phases:
    """Peaks of the phases of a step, and its work."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.number_bytes = trace, 0
        self.peaks: dict[str, int] = {}
        self.work: list[Work] = []

    def passed(self, phase: str) -> None:
        """A phase is over, if it is for the first time."""
        if phase not in self.peaks:
            self.peaks[phase] = self.trace.peak_bytes
            self.work.append(self.trace.work())
            self.number_bytes += self.trace.kept_number_bytes
            self.trace.reset()


def _ghosts(
    calls: tuple[Call, ...],
    table: CostTable,
    trace: Trace,
    where: str,
    passed: Callable[[str], None],
    blocks: dict[str, Planned],
) -> GhostRuns:
    return GhostRuns(blocks, calls, table, trace, where, passed)
