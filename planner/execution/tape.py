"""What backward needs of one forward under a schedule: records, in the order in which they were made.

A step's backward pops the tape until its own record is on top; a checkpoint that is popped on the way is run
again from the state it kept, and leaves the records of its parts instead. A step of which nothing will run
again is left to autograd's own graph, and its record is what lets go of what that keeps, should backward come
past it. What autograd guarantees holds for
what runs again: it does so under forward's context, with the parameters of that forward, and on tensors that
nobody has written into since. How a step runs is its `Runs`' affair; the tape knows when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from evoplan.cost_model.liveness import Liveness
from evoplan.model.running.chain import State
from evoplan.model.running.internals import backward_pass, is_batched
from evoplan.model.running.regions import region
from evoplan.model.running.remake import Keeping, come_past
from evoplan.model.running.strategy import Record, Strategy
from evoplan.model.running.unchanged import Mark, check, marks
from evoplan.planner.execution.departures import Departures
from evoplan.planner.execution.placed import Outputs, Placed, Runs
from evoplan.planner.schedules.schedule import Action, Checkpoint, actions, shortened


@dataclass(frozen=True)
class _RecordedStep:
    """A step and what its strategy kept of it; `forward`: of forward itself, not of a redo."""

    step: Placed
    kept: Record
    forward: bool

    @property
    def first(self) -> int:
        return self.step.index


@dataclass(frozen=True)
class _WrittenStep:
    """A step in autograd's own graph, and what that keeps of it, where it can be let go of."""

    step: Placed
    kept: Keeping | None

    @property
    def first(self) -> int:
        return self.step.index


@dataclass(frozen=True)
class _KeptEntry:
    """A checkpoint and the state it starts from."""

    part: Checkpoint
    entry: State
    marks: Mapping[str, Mark]

    @property
    def first(self) -> int:
        return self.part.span.start


_OnTape = _RecordedStep | _WrittenStep | _KeptEntry


class Tape:
    """Records of one forward pass, for its backward: for several, if all but the last keep the graph."""

    def __init__(
        self,
        steps: tuple[Any, ...],
        liveness: Liveness,
        runs: Runs[Any],
        departures: Departures | None = None,
    ) -> None:
        self.steps, self.liveness, self.runs, self.departures = steps, liveness, runs, departures
        self._records: list[_OnTape] = []
        self._kept: list[_OnTape] | None = None
        self._pass: int | None = None
        self._at: Placed | None = None

    # --- forward ---------------------------------------------------------------------------

    def advance(self, step: Placed, action: Action, state: State, inputs: Iterable[Tensor]) -> Outputs:
        """A step of forward: what it makes, as a node of autograd's graph if there is a gradient to find.

        Args:
            inputs: what backward may find gradients of, in the order of `Runs.vjp`.
        """
        assert action.run is not None
        how = step, action.run.strategy, action.recorded
        if not self.runs.met[step.index].differentiable:
            return self.run(*how, state)
        made: Outputs = _StepNode.apply(self, state, *how, *inputs)  # type: ignore[no-untyped-call]
        for node in _nodes_of(made):
            node.register_prehook(laid_out)
        return made

    def written(self, step: Placed, made: Outputs, kept: Keeping | None) -> None:
        """A step of forward has run in autograd's own graph.

        Args:
            made: what it makes.
            kept: what the graph keeps for its backward, where that can be let go of.
        """
        nodes = _nodes_of(made)
        if nodes:
            self._records.append(_WrittenStep(step, kept))
        for node in nodes:
            node.register_prehook(partial(self._comes_by, step))

    def enter(self, action: Action, state: Mapping[str, Tensor]) -> None:
        """Keep what the steps of the checkpoints that begin here read from outside."""
        if self.departures is not None and self._pass is None:
            self.departures.enter(action.step, state)
        for part in action.enters:
            entry = {name: state[name].detach() for name, _ in self.liveness.entry(part.span)}
            self._records.append(_KeptEntry(part, entry, marks(entry)))

    def leave(self, action: Action) -> None:
        """A step is done: forget a checkpoint of which nothing is to be differentiated, as that has shown."""
        if self.departures is not None:
            top = self._records[-1] if self._records else None
            own = top.kept if isinstance(top, _RecordedStep) and top.first == action.step else None
            self.departures.leave(action.step, own)
        part = action.leaves
        if part is not None and not any(self.runs.met[step].differentiable for step in part.span):
            self._records.pop()

    def stop_before(self, step: int) -> None:
        """The forward goes on without the plan: an open checkpoint ends here, or does not begin."""
        top = self._records[-1] if self._records else None
        while isinstance(top, _KeptEntry) and top.part.span.start == step:
            self._records.pop()
            top = self._records[-1] if self._records else None
        if isinstance(top, _KeptEntry) and top.part.span.stop > step > top.part.span.start:
            body = shortened(top.part.body, step)
            part = Checkpoint(body, top.part.discard[: len(body.span)])
            self._records[-1] = _KeptEntry(part, top.entry, top.marks)

    def run(self, step: Placed, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]) -> Outputs:
        """Run one step's forward; what it makes belongs to the caller."""
        with region(step.name):
            kept, made = self.runs.run(step, strategy, recorded, state)
        if kept is not None:
            self._records.append(_RecordedStep(step, kept, self._pass is None))
        return made

    # --- backward --------------------------------------------------------------------------

    def backward(self, step: Placed, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of a step's inputs from those of what it made; steps come last to first."""
        keep = self._begin()
        if self.departures is not None:
            self.departures.before(step.index)
        record = self._come_to(step, keep)
        assert isinstance(record, _RecordedStep)  # as it is a node of the tape's
        self.runs.check(step)
        with region(f"{step.name} backward"):
            return self.runs.vjp(step, record.kept, grads, keep and record.forward)

    def _comes_by(self, step: Placed, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Backward is about to differentiate a step in autograd's own graph."""
        refuse_another_derivative(step.name, grads)
        keep = self._begin()
        if self._at is not step:  # it may have made several tensors
            self._come_to(step, keep)
        return laid_out(grads)

    def _come_to(self, step: Placed, keep: bool) -> _RecordedStep | _WrittenStep:
        """Pop the records of later steps, and the step's own."""
        self._at = step
        while self._records:
            top = self._records.pop()
            if isinstance(top, _KeptEntry) and step.index in top.part.span:
                self._run_again(top)
            elif not isinstance(top, _KeptEntry) and top.step is step:
                return top
            elif top.first < step.index:
                break
            elif isinstance(top, _WrittenStep) and top.kept is not None and not keep:
                top.kept.drop()
            # No gradient has reached the steps of this record: nothing depends on them.
        raise RuntimeError(come_past(step.name))

    def _begin(self) -> bool:
        """Take the records up as forward left them, if a new backward begins; whether to keep them so."""
        number, keep = backward_pass()
        if number != self._pass:
            self._pass, self._at = number, None
            if self._kept is not None:
                self._records = self._kept
            self._kept = list(self._records) if keep else None
        return keep

    def _run_again(self, kept: _KeptEntry) -> None:
        body = kept.part.body
        check(kept.marks, kept.entry, self.steps[body.span.start].name)
        todo = {self.steps[action.step]: action for action in actions(body, redo=True)}

        def perform(step: Placed, state: State) -> None:
            action = todo[step]
            self.enter(action, state)
            if action.run is not None:
                self.runs.check(step)
                self._step_again(step, action, state)

        self.runs.walk(todo, dict(kept.entry), perform)

    def _step_again(self, step: Placed, action: Action, state: State) -> None:
        with region(step.name):
            kept, made = self.runs.again(step, action, state)
        if kept is not None:
            self._records.append(_RecordedStep(step, kept, False))
        if made is not None:
            state.update(zip(step.makes, made, strict=True))
            for name in self.liveness.last_reads(step.index):
                del state[name]


class _StepNode(torch.autograd.Function):
    """One step in autograd's graph: its inputs are what gradients are found of."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, state: State, step: Placed, strategy: Strategy, recorded: bool, *inputs: Tensor
    ) -> Outputs:
        ctx.tape, ctx.step = tape, step
        ctx.set_materialize_grads(False)
        made = tape.run(step, strategy, recorded, state)
        ctx.mark_non_differentiable(*tape.runs.closed(step, made))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_another_derivative(ctx.step.name, grads)
        return (*(None,) * 5, *ctx.tape.backward(ctx.step, grads))


def _nodes_of(made: Iterable[Tensor]) -> list[Node]:
    """Of autograd's graph, that have made these: each once."""
    return list({id(t.grad_fn): t.grad_fn for t in made if t.grad_fn is not None}.values())


def refuse_another_derivative(name: str, grads: tuple[Tensor | None, ...]) -> None:
    """RuntimeError in a backward that is to be differentiated, of which autograd's own guard sees only some;
    and in one for several gradients at once.
    """
    if any(grad is not None and is_batched(grad) for grad in grads):
        raise RuntimeError(
            f"{name} runs under a plan, whose gradients are found one at a time (no torch.func, no "
            "is_grads_batched); call the model without a plan for that"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} runs under a plan, whose gradients cannot be differentiated again "
            "(create_graph=True); call the model without a plan for that"
        )


def laid_out(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A sum's gradient is one number in every place: it is laid out where the plan counts it.

    Before a node's backward, which would hold what it is given to its end.
    """
    return tuple(None if grad is None else grad.contiguous() for grad in grads)
