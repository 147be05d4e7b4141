"""What backward needs of one forward under a schedule: records, in the order in which they were made.

A step's backward pops the tape until its own record is on top; a checkpoint that is popped on the way is run
again from the state it kept, and leaves the records of its parts instead. What autograd guarantees holds for
what runs again: it does so under forward's context, with the parameters of that forward, and on tensors that
nobody has written into since.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from evoplan.cost_model.liveness import Liveness
from evoplan.model.running.chain import Chain, State, Step
from evoplan.model.running.context import Context
from evoplan.model.running.execution import kept_input, record, run_discarded
from evoplan.model.running.gradients import OfParameters, OfState
from evoplan.model.running.internals import backward_pass, has_hooks
from evoplan.model.running.layers import altered_layers
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.random_state import RandomState
from evoplan.model.running.regions import region
from evoplan.model.running.strategy import Record, Strategy
from evoplan.model.running.unchanged import Mark, check, mark, marks
from evoplan.planner.schedules.schedule import Action, Checkpoint, actions


@dataclass(frozen=True)
class Met:
    """A step as forward met it.

    Attributes:
        wanted: state tensors, by the submodule's names, that a gradient is wanted of.
        random: where the generators stood, if the step may draw from them.
        buffers: marks of the buffers, which such a step may change.
    """

    parameters: Parameters
    wanted: tuple[str, ...]
    random: RandomState | None
    buffers: Mapping[str, Mark]

    @property
    def differentiable(self) -> bool:
        """Whether there is a gradient to find at all."""
        return bool(self.wanted or self.parameters.trained)


@dataclass(frozen=True)
class _RecordedStep:
    """A step and what its strategy kept of it; `first`: of forward itself, not of a redo."""

    step: Step
    kept: Record
    forward: bool

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


class Tape:
    """Records of one forward pass, for its backward: for several, if all but the last keep the graph.

    Args:
        constants: masks and the like.
        seed: of dropout.
    """

    def __init__(
        self, chain: Chain, liveness: Liveness, constants: Mapping[str, Tensor], seed: int | None
    ) -> None:
        self.chain, self.liveness, self.constants, self.seed = chain, liveness, constants, seed
        self.context = Context.of_steps()
        self.met: dict[int, Met] = {}
        self._constant_marks = marks(constants)
        self._records: list[_RecordedStep | _KeptEntry] = []
        self._kept: list[_RecordedStep | _KeptEntry] | None = None
        self._pass: int | None = None

    # --- forward ---------------------------------------------------------------------------

    def meet(self, step: Step, read: tuple[Tensor, ...]) -> Met:
        """Look a step up as it is at this forward, about to run on these tensors."""
        of_state = zip(step.submodule.reads, read, strict=True)
        wanted = tuple(name for name, tensor in of_state if tensor.requires_grad)
        # Our own layers draw nothing and change nothing.
        altered = any(altered_layers(step.submodule))
        random, buffers = (RandomState(), step.submodule.named_buffers()) if altered else (None, ())
        met = Met(Parameters(step.submodule), wanted, random, marks(dict(buffers)))
        self.met[step.index] = met
        return met

    def keep_entry(self, part: Checkpoint, state: Mapping[str, Tensor]) -> None:
        """Keep what the steps of a checkpoint read from outside."""
        entry = {name: state[name].detach() for name, _ in self.liveness.entry(part.span)}
        self._records.append(_KeptEntry(part, entry, marks(entry)))

    def drop_entry(self, part: Checkpoint) -> None:
        """Forget a checkpoint of which nothing is to be differentiated, as its first pass has shown."""
        if not any(self.met[step].differentiable for step in part.span):
            self._records.pop()

    def run(self, step: Step, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]) -> Tensor:
        """Run one step's forward; its new target belongs to the caller.

        Raises:
            ValueError: a layer draws random numbers, and the strategy runs the step in pieces.
        """
        met = self.met[step.index]
        tensors = step.tensors(state, self.constants, self.seed)
        with region(step.name):
            if recorded and met.differentiable:
                kept, output = record(step.submodule, strategy, tensors, met.wanted, step.name)
                self._records.append(_RecordedStep(step, kept, self._pass is None))
            else:
                with torch.no_grad():
                    output = run_discarded(step.submodule, strategy, tensors)
        if met.random is not None:
            self._check_repeatable(step, strategy, recorded, met.random)
        return output

    def _check_repeatable(self, step: Step, strategy: Strategy, recorded: bool, random: RandomState) -> None:
        """Refuse a step that would not do the same again, where it is to run again."""
        if strategy.in_pieces and random.moved():
            raise ValueError(
                f"a layer of {step.name} draws random numbers, which come out otherwise in pieces "
                f"({strategy}); use a plan that runs it whole"
            )
        if recorded and not strategy.in_pieces:
            return
        for name, before in self.met[step.index].buffers.items():
            if mark(name, step.submodule.get_buffer(name)) != before:
                raise ValueError(
                    f"{name} of {step.name} changes with every forward, which the plan runs more than once "
                    f"({strategy}); use a plan that keeps this step, or put it in eval mode"
                )

    # --- backward --------------------------------------------------------------------------

    def backward(self, step: Step, grad: Tensor) -> tuple[OfState, OfParameters]:
        """Gradients of a step's inputs from that of its new target; steps come last to first."""
        keep = self._begin()
        while self._records:
            top = self._records.pop()
            if isinstance(top, _KeptEntry) and step.index in top.part.span:
                self._run_again(top)
            elif isinstance(top, _RecordedStep) and top.step is step:
                self._check_constants(step)
                with region(f"{step.name} backward"):
                    return top.kept.vjp(grad, keep and top.forward)
            elif top.first < step.index:
                break
            # Else no gradient reached the steps of this record: nothing depends on them.
        raise RuntimeError(
            f"{step.name} has no record any more: backward was here before; "
            "call forward again, or backward(retain_graph=True) the first time"
        )

    def _begin(self) -> bool:
        """Take the records up as forward left them, if a new backward begins; whether to keep them so."""
        number, keep = backward_pass()
        if number != self._pass:
            self._pass = number
            if self._kept is not None:
                self._records = self._kept
            self._kept = list(self._records) if keep else None
        return keep

    def _check_constants(self, step: Step) -> None:
        named = {name: self.constants[name] for name in map(step.name_of, step.submodule.constants)}
        check({name: self._constant_marks[name] for name in named}, named, step.name)

    def _run_again(self, kept: _KeptEntry) -> None:
        body, steps = kept.part.body, self.chain.steps
        check(kept.marks, kept.entry, steps[body.span.start].name)
        todo = {steps[action.step]: action for action in actions(body, redo=True)}
        state = dict(kept.entry)

        def perform(step: Step, state: State) -> None:
            action = todo[step]
            for part in action.enters:
                self.keep_entry(part, state)
            if action.run is not None:
                self._check_constants(step)
                self.met[step.index].parameters.check(step.name)
                self._step_again(step, action, state)

        with self.context:
            self.chain.walk(todo, state, perform)

    def _step_again(self, step: Step, action: Action, state: State) -> None:
        run, met = action.run, self.met[step.index]
        assert run is not None
        if not action.forward and not has_hooks(step.submodule):
            # Nobody reads what it makes: its record is its input.
            with met.parameters.installed():
                tensors = step.tensors(state, self.constants, self.seed)
                kept = kept_input(step.submodule, run.strategy, tensors, met.wanted, step.name)
            self._records.append(_RecordedStep(step, kept, False))
            return

        def again(*read: Tensor) -> Tensor:
            with met.parameters.installed(), met.random or nullcontext():
                return self.run(step, run.strategy, action.recorded, step.named(read))

        state[step.target] = step.called(state, again)
        for name in self.liveness.last_reads(step.index):
            del state[name]
