"""The executor: a model run by interpreting a schedule.

Every step is one node of autograd's graph, so parameter gradients come back step by step (DDP's
hooks and `torch.autograd.grad` see them as usual). What nodes need for backward lies on a tape
(`planner.execution.tape`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evoplan.cost_model.liveness import Liveness
from evoplan.model.running.chain import Chain, Plannable, State, Step
from evoplan.model.running.context import Context
from evoplan.model.running.execution import run_discarded
from evoplan.model.running.internals import has_hooks, has_saving_hooks, keeps_results
from evoplan.model.running.layers import altered_layers
from evoplan.model.running.regions import region
from evoplan.model.running.view import View
from evoplan.planner.execution.departures import Departures, StateAway
from evoplan.planner.execution.donating import check_there, taken
from evoplan.planner.execution.host import Host
from evoplan.planner.execution.shapes import Fit, Fits, cropped, padded
from evoplan.planner.execution.submodules import SubmoduleRuns
from evoplan.planner.execution.tape import Tape
from evoplan.planner.files import check_writable
from evoplan.planner.pages.writing import traced_content, write_pages
from evoplan.planner.plans.plan import Plan
from evoplan.planner.schedules.offload import check_waits, waits
from evoplan.planner.schedules.schedule import RECORD, Sequence, actions, all_runs
from evoplan.planner.schedules.waiting import check_away, moves

_INFERENCE = "the plan is for inference: call the model under torch.no_grad()"
# Each step's backward is one of its own to torch, and a selective checkpoint is there for one.
_SELECTIVE = (
    "the planned model is called inside a selective checkpoint (create_selective_checkpoint_contexts), whose "
    "results can be had once, not for each step's backward; call it outside: its plan says what is kept"
)


class PlannedModule(View):
    """A stack under a schedule: same parameters by the same names, same arguments, same results.

    Parameters, submodules and hooks are the stack's, whichever they are when it is called, and each block and
    submodule is called as the stack would call it.

    Args:
        stack: the model, or one rank's share of it.
        schedules: one that covers all its steps, for inputs of any shape; or several for different ones.
        host: makes where what is off the device waits, for each forward.
        donated: take the state that forward is given, in inference: the caller's tensors are empty as soon as
            it runs, their memory is written over and let go of, and results may lie in it. After an error in
            a step they are lost.

    Attributes:
        plans: that it runs under, as `apply_plan` was given them.

    Raises:
        ValueError: a schedule is for another chain of steps.
    """

    stack: Plannable
    plans: tuple[Plan, ...] = ()

    def __init__(
        self,
        stack: Plannable,
        schedules: Sequence | Fits,
        host: Callable[[], Host] = Host,
        donated: bool = False,
    ) -> None:
        super().__init__(stack)
        self.fits = Fits([Fit(schedules)]) if isinstance(schedules, Sequence) else schedules
        self.host, self.donated = host, donated
        chain = Chain.of(stack)
        self.liveness = Liveness([step.reads for step in chain.steps], chain.outputs, donated=donated)
        for fit in self.fits.all:
            _check_covers(fit.schedule, chain)
            check_away(fit.schedule, self.liveness)
            check_waits(fit.schedule, self.liveness)

    # A compiled model around it breaks its graph here, and nowhere else.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, *tensors: Tensor, dropout_seed: int | None = None, **named: Tensor
    ) -> tuple[Tensor, ...]:
        """As the stack's own forward.

        Raises:
            ValueError: inputs that no schedule is for, that take more than is planned, or that cannot be
                donated where they are to be.
        """
        if self.donated and torch.is_grad_enabled():
            raise ValueError(_INFERENCE)
        if self.donated:
            check_there(self.stack.arguments(*tensors, **named), self.stack.config.state)
        state, constants = self.stack.prepared(*tensors, **named)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        fit = self.fits.find(self.stack, shapes)
        pads = self.fits.other_shapes == "pad" and fit.shapes not in (None, shapes)
        if pads and fit.shapes is not None:
            arguments = self.stack.arguments(*tensors, **named)
            state, constants = self.stack.prepare(**padded(self.stack, arguments, fit.shapes))
            del arguments
        if self.donated:
            state = self._taken(fit, state, constants, self.stack.arguments(*tensors, **named))
        else:
            fit.check_room((*tensors, *named.values()), (*state.values(), *constants.values()))
        del tensors, named
        self._run(fit.schedule, state, constants, self.stack.draw_seed(dropout_seed))
        results = self.stack.results(state)
        if pads:
            names = self.stack.outputs
            return tuple(cropped(tensor, shapes[n]) for n, tensor in zip(names, results, strict=True))
        return results

    def _taken(
        self, fit: Fit, state: State, constants: Mapping[str, Tensor], given: Mapping[str, Any]
    ) -> State:
        """The state, taken from forward's arguments."""
        others = [tensor for name, tensor in given.items() if name not in state and tensor is not None]
        fit.check_room(others, constants.values())
        own = (*constants.values(), *self.stack.parameters(), *self.stack.buffers())
        kind = next(iter(state.values())).device.type
        dtype = None if torch.is_autocast_enabled(kind) else next(self.stack.parameters()).dtype
        return taken(state, {name: given[name] for name in state}, (*others, *own), dtype)

    def report_html(self, path: str | Path, index: int = 0) -> None:
        """Write one page about a plan: what is done with each step, memory over time, the frontier.

        Args:
            index: of the plan, where there are several.

        Raises:
            ValueError: the module was made of schedules alone, or the file cannot be written.
        """
        if not self.plans:
            raise ValueError("only what apply_plan returns knows its plan")
        check_writable(path)
        write_pages(traced_content(self.plans[index]), html=path)

    def _run(
        self, schedule: Sequence, state: State, constants: Mapping[str, Tensor], seed: int | None
    ) -> None:
        """All steps over the state, which is the last one afterwards."""
        chain = Chain.of(self.stack)
        _check_covers(schedule, chain)
        if torch.is_grad_enabled():
            if any(run.away for run in all_runs(schedule)):
                raise ValueError(_INFERENCE)
            self._record(chain, constants, seed, schedule, state)
        else:
            with Context.of_steps():
                self._infer(chain, schedule, state, partial(Step.tensors, constants=constants, seed=seed))

    def _infer(
        self, chain: Chain, schedule: Sequence, state: State, tensors: Callable[[Step, State], State]
    ) -> None:
        """Every step once. What is the chain's own is written over and may leave the device."""
        host = StateAway(self.host())
        # A hook may keep what it sees, so that nothing may be written over.
        owned = not _has_hooks(chain)
        *todo, (_, _, last) = moves(schedule)

        def perform(step: Step, state: State) -> None:
            run, put, take = todo[step.index]
            assert run is not None
            host.move(state, put, take)
            in_place = owned and self.liveness.owns_target(step.index)

            def new_target(*read: Tensor) -> Tensor:
                with region(step.name):
                    of_stages = tensors(step, step.named(read))
                    return run_discarded(step.submodule, run.strategy, of_stages, in_place)

            state[step.target] = step.called(state, new_target)
            self._forget(step, state)

        chain.walk(chain.steps, state, perform)
        host.move(state, (), last)

    def _record(
        self,
        chain: Chain,
        constants: Mapping[str, Tensor],
        seed: int | None,
        schedule: Sequence,
        state: State,
    ) -> None:
        """A forward for a backward."""
        if keeps_results():
            raise ValueError(_SELECTIVE)
        departures = None
        if waits(schedule):
            onlooker = _onlooker(chain)
            if onlooker is not None:
                warnings.warn(
                    "nothing waits in host memory, and the step may need more than was planned: "
                    f"{onlooker}; plan without host memory",
                    stacklevel=3,
                )
            else:
                departures = Departures(schedule, self.host())
        records = {part.span.start for part in schedule.parts if departures and RECORD in part.wait}
        runs = SubmoduleRuns(chain, constants, seed, records, in_graph=not waits(schedule))
        tape = Tape(chain.steps, self.liveness, runs, departures)
        todo = tuple(actions(schedule))

        def perform(step: Step, state: State) -> None:
            action = todo[step.index]
            tape.enter(action, state)

            def new_target(*read: Tensor) -> Tensor:
                if runs.as_written(action):
                    kept, new = runs.written(step, action, step.named(read))
                    tape.written(step, (new,), kept)
                    return new
                inputs = runs.meet(step, read)
                (new,) = tape.advance(step, action, step.named(read), inputs)
                return new

            state[step.target] = step.called(state, new_target)
            self._forget(step, state)
            tape.leave(action)

        with runs.context:
            chain.walk(chain.steps, state, perform)

    def _forget(self, step: Step, state: State) -> None:
        for name in self.liveness.last_reads(step.index):
            del state[name]


def _has_hooks(chain: Chain) -> bool:
    """Whether something hangs on what sees the state, and may keep it: blocks, submodules, their norms."""
    found = ((step.block, step.submodule, *step.submodule.norms.modules()) for step in chain.steps)
    return any(has_hooks(module) for modules in found for module in modules)


def _onlooker(chain: Chain) -> str | None:
    """Who may keep what training is to let wait; None: nobody."""
    if _has_hooks(chain):
        return "a submodule, its norm or a block has hooks, which may keep what they see"
    if any(any(altered_layers(step.submodule.norms)) for step in chain.steps):
        return "a norm was replaced, and may keep what it sees"
    if has_saving_hooks():
        return (
            "something around the model keeps in its own way what autograd saves (torch.utils.checkpoint, "
            "save_on_cpu, saved_tensors_hooks)"
        )
    return None


def _check_covers(schedule: Sequence, chain: Chain) -> None:
    if schedule.span != range(len(chain.steps)):
        raise ValueError(f"the plan covers {len(schedule.span)} steps, the model has {len(chain.steps)}")
