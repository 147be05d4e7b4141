"""The executor: a model run by interpreting a schedule.

Every step is one node of autograd's graph, so parameter gradients come back step by step (DDP's
hooks and `torch.autograd.grad` see them as usual). What nodes need for backward lies on a tape:
a stack of records, one per part of the schedule, in the order in which they ran. A step's backward
pops the tape until its own record is on top; a checkpoint that is popped on the way is run again
from the state it kept, and leaves the records of its parts instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from evoplan.cost_model.liveness import Liveness
from evoplan.model.chain import Chain, Plannable, State, Step
from evoplan.model.execution import (
    Gradients,
    ParameterGradients,
    PiecewiseRun,
    WholeRun,
    record,
    run_discarded,
)
from evoplan.model.regions import region
from evoplan.model.strategy import Strategy
from evoplan.planner.host import Host, check_away, moves
from evoplan.planner.schedule import Checkpoint, Run, Sequence, needs_forward


@dataclass
class _RecordedStep:
    """A step and what its strategy kept of it."""

    step: Step
    kept: WholeRun | PiecewiseRun

    @property
    def first(self) -> int:
        return self.step.index


@dataclass
class _KeptEntry:
    """A checkpoint and the state it starts from."""

    part: Checkpoint
    entry: State

    @property
    def first(self) -> int:
        return self.part.span.start


class Tape:
    """Records of one forward pass, for one backward."""

    def __init__(
        self, chain: Chain, liveness: Liveness, constants: Mapping[str, Tensor], seed: int | None
    ) -> None:
        self.chain, self.liveness, self.constants, self.seed = chain, liveness, constants, seed
        self._records: list[_RecordedStep | _KeptEntry] = []

    def keep_entry(self, part: Checkpoint, state: Mapping[str, Tensor]) -> None:
        """Keep what the steps of a checkpoint read from outside."""
        entry = {name: state[name].detach() for name, _ in self.liveness.entry(part.span)}
        self._records.append(_KeptEntry(part, entry))

    def run(self, step: Step, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]) -> Tensor:
        """Run one step's forward; its new target belongs to the caller."""
        tensors = step.tensors(state, self.constants, self.seed)
        with region(step.name):
            if not recorded:
                return run_discarded(step.submodule, strategy, tensors)
            kept, output = record(step.submodule, strategy, tensors)
        self._records.append(_RecordedStep(step, kept))
        return output

    def backward(self, step: Step, grad: Tensor) -> tuple[Gradients, ParameterGradients]:
        """Gradients of a step's inputs from that of its new target; steps come last to first."""
        while self._records:
            top = self._records.pop()
            if isinstance(top, _KeptEntry) and step.index in top.part.span:
                self._run_again(top.part.body, top.entry)
            elif isinstance(top, _RecordedStep) and top.step is step:
                with region(f"{step.name} backward"):
                    return top.kept.vjp(grad)
            elif top.first < step.index:
                break
            # Else no gradient reached the steps of this record: nothing depends on them.
        raise RuntimeError(
            f"{step.name} has no record: a planned model keeps what one backward needs; "
            "call forward again before a second backward"
        )

    def _run_again(self, body: Sequence, entry: State) -> None:
        state = dict(entry)
        for part in body.parts:
            runs_forward = needs_forward(part, body, redo=True)
            if isinstance(part, Checkpoint):
                self.keep_entry(part, state)
                for run in part.first_pass() if runs_forward else ():
                    self._advance(run, False, state)
            elif runs_forward:
                self._advance(part, True, state)
            else:
                step = self.chain.steps[part.step]
                tensors = step.tensors(state, self.constants, self.seed)
                kept = PiecewiseRun(step.submodule, part.strategy, tensors)
                self._records.append(_RecordedStep(step, kept))

    def _advance(self, run: Run, recorded: bool, state: State) -> None:
        step = self.chain.steps[run.step]
        state[step.target] = self.run(step, run.strategy, recorded, state)
        for name in self.liveness.last_reads(run.step):
            del state[name]


class _StepNode(torch.autograd.Function):
    """One step in autograd's graph: inputs are the state tensors it reads and its parameters."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, step: Step, strategy: Strategy, recorded: bool, *inputs: Tensor
    ) -> Tensor:
        ctx.tape, ctx.step = tape, step
        return tape.run(step, strategy, recorded, dict(zip(step.reads, inputs, strict=False)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, parameters = ctx.tape.backward(ctx.step, grad)
        return (
            *(None,) * 4,
            *(state[name] for name in ctx.step.submodule.reads),
            *(parameters.get(name) for name in ctx.step.parameters),
        )


class PlannedModule(nn.Module):
    """A stack under a schedule: same parameters, same arguments, same results.

    Args:
        stack: the model, or one rank's share of it.
        schedule: covers all its steps.
        shapes: the state's shapes that the schedule was made for; others are refused. None: any.
        host: makes where state waits that is off the device, for each forward.
    """

    def __init__(
        self,
        stack: Plannable,
        schedule: Sequence,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        host: Callable[[], Host] = Host,
    ) -> None:
        super().__init__()
        self.stack, self.schedule, self.shapes, self.host = stack, schedule, shapes, host
        self.chain = Chain.of(stack)
        self.liveness = Liveness([step.reads for step in self.chain.steps], self.chain.outputs)
        if schedule.span != range(len(self.chain.steps)):
            raise ValueError(
                f"the plan covers {len(schedule.span)} steps, the model has {len(self.chain.steps)}"
            )
        check_away(schedule, self.liveness)

    def forward(
        self, *tensors: Tensor, dropout_seed: int | None = None, **named: Tensor
    ) -> tuple[Tensor, ...]:
        """As the stack's own forward."""
        state, constants = self.stack.prepare(*tensors, **named)
        del tensors, named
        for name, shape in (self.shapes or {}).items():
            if tuple(state[name].shape) != shape:
                raise ValueError(f"the plan is for {name} of shape {shape}, not {tuple(state[name].shape)}")
        seed = self.stack.draw_seed(dropout_seed)
        if torch.is_grad_enabled():
            self._record(Tape(self.chain, self.liveness, constants, seed), state)
        else:
            self._infer(state, constants, seed)
        return self.stack.results(state)

    def _infer(self, state: State, constants: Mapping[str, Tensor], seed: int | None) -> None:
        """Every step once. What the chain itself has made is written over and may leave the device."""
        host = self.host()
        for run, put, take in moves(self.schedule):
            host.move(state, put, take)
            if run is None:
                break
            step = self.chain.steps[run.step]
            tensors, in_place = step.tensors(state, constants, seed), self.liveness.owns_target(run.step)
            with region(step.name):
                state[step.target] = run_discarded(step.submodule, run.strategy, tensors, in_place)
            del tensors
            for name in self.liveness.last_reads(run.step):
                del state[name]

    def _record(self, tape: Tape, state: State) -> None:
        """A forward for one backward."""
        for part in self.schedule.parts:
            if isinstance(part, Run):
                if part.away:
                    raise ValueError("the plan is for inference: call the model under torch.no_grad()")
                self._advance(part, True, tape, state)
                continue
            tape.keep_entry(part, state)
            for run in part.first_pass():
                self._advance(run, False, tape, state)

    def _advance(self, run: Run, recorded: bool, tape: Tape, state: State) -> None:
        step = self.chain.steps[run.step]
        inputs = [state[name] for name in step.reads]
        state[step.target] = _StepNode.apply(
            tape, step, run.strategy, recorded, *inputs, *step.parameters.values()
        )
        for name in self.liveness.last_reads(run.step):
            del state[name]
