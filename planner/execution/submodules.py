"""How submodules run under a tape: by their stages, called so that whatever hangs on them is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from evoplan.model.running.chain import Chain, State, Step
from evoplan.model.running.context import Context
from evoplan.model.running.execution import record, record_unread, run_discarded, write
from evoplan.model.running.internals import has_hooks
from evoplan.model.running.layers import altered_layers
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.random_state import RandomState
from evoplan.model.running.regions import region
from evoplan.model.running.remake import Keeping
from evoplan.model.running.strategy import Record, Strategy
from evoplan.model.running.submodule import Submodule
from evoplan.model.running.unchanged import Mark, check, mark, marks
from evoplan.planner.execution.placed import Outputs
from evoplan.planner.schedules.schedule import Action


@dataclass(frozen=True)
class MetSubmodule:
    """A submodule as forward met it.

    Attributes:
        read: the state tensors that it reads, by its own names.
        random: where the generators stood, if it may draw from them.
        buffers: marks of the buffers, which such a submodule may change.
    """

    parameters: Parameters
    read: tuple[str, ...]
    wanted: tuple[str, ...]
    random: RandomState | None
    buffers: Mapping[str, Mark]

    @property
    def differentiable(self) -> bool:
        """Whether there is a gradient to find at all."""
        return bool(self.wanted or self.parameters.trained)


class SubmoduleRuns:
    """Of one forward of a model that is a chain of submodules.

    Args:
        constants: masks and the like.
        seed: of dropout.
        waiting: steps whose records are to know their storages.
        in_graph: whether autograd may have steps in its own graph, of which nothing will run again: not
            where anything waits elsewhere until its backward.
    """

    def __init__(
        self,
        chain: Chain,
        constants: Mapping[str, Tensor],
        seed: int | None,
        waiting: Collection[int] = (),
        in_graph: bool = True,
    ) -> None:
        self.chain, self.constants, self.seed = chain, constants, seed
        self.waiting, self.in_graph = waiting, in_graph
        self.context = Context.of_steps()
        self.met: dict[int, MetSubmodule] = {}
        self._marks = marks(constants)

    def meet(self, step: Step, read: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Look a step up as it is at this forward, about to run on these tensors: what has a gradient."""
        names = step.submodule.reads
        wanted = tuple(name for name, tensor in zip(names, read, strict=True) if tensor.requires_grad)
        # Our own layers draw nothing and change nothing.
        altered = any(altered_layers(step.submodule))
        random, buffers = (RandomState(), step.submodule.named_buffers()) if altered else (None, ())
        parameters = Parameters(step.submodule)
        self.met[step.index] = MetSubmodule(parameters, names, wanted, random, marks(dict(buffers)))
        return *read, *parameters.trained.values()

    def as_written(self, action: Action) -> bool:
        """Whether a step of forward runs in autograd's own graph."""
        run = action.run
        return self.in_graph and run is not None and action.recorded and not run.strategy.in_pieces

    def written(
        self, step: Step, action: Action, state: Mapping[str, Tensor]
    ) -> tuple[Keeping | None, Tensor]:
        """What the graph keeps of such a step, where it can be let go of, and what the step makes."""
        assert action.run is not None
        tensors = step.tensors(state, self.constants, self.seed)
        with region(step.name):
            return write(step.submodule, action.run.strategy, tensors, step.name)

    def run(
        self, step: Step, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]
    ) -> tuple[Record | None, Outputs]:
        """As `planner.execution.tape.Runs` has it.

        Raises:
            ValueError: a layer draws random numbers, and the strategy runs the step in pieces.
        """
        met, kept = self.met[step.index], None
        tensors = step.tensors(state, self.constants, self.seed)
        if recorded and met.differentiable:
            movable = step.index in self.waiting
            about = met.wanted, step.name, met.parameters, movable
            kept, made = record(step.submodule, strategy, tensors, *about)
        else:
            with torch.no_grad():
                made = run_discarded(step.submodule, strategy, tensors)
        if met.random is not None:
            self._check_repeatable(step, strategy, recorded, met.random)
        return kept, (made,)

    def closed(self, step: Step, made: Outputs) -> Iterable[Tensor]:
        """As `planner.execution.tape.Runs` has it: nothing."""
        return ()

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

    def again(
        self, step: Step, action: Action, state: Mapping[str, Tensor]
    ) -> tuple[Record | None, Outputs | None]:
        """As `planner.execution.tape.Runs` has it."""
        run, met, kept = action.run, self.met[step.index], None
        assert run is not None
        met.parameters.check(step.name)
        if action.unread and not _is_more_than_its_stages(step.submodule):
            with met.parameters.installed(), met.random or nullcontext():
                tensors = step.tensors(state, self.constants, self.seed)
                how = run.strategy, tensors, met.wanted, step.name, met.parameters
                return record_unread(step.submodule, *how), None

        def again(*read: Tensor) -> Tensor:
            nonlocal kept
            with met.parameters.installed(), met.random or nullcontext():
                kept, (made,) = self.run(step, run.strategy, action.recorded, step.named(read))
            return made

        made = step.called(state, again)
        return kept, (made,)

    def vjp(
        self, step: Step, kept: Record, grads: tuple[Tensor | None, ...], keep: bool
    ) -> tuple[Tensor | None, ...]:
        """As `planner.execution.tape.Runs` has it."""
        (grad,), met = grads, self.met[step.index]
        assert grad is not None  # there is no other that backward could come by
        state, parameters = kept.vjp(grad, keep)
        return (
            *(state.get(name) for name in met.read),
            *(parameters.get(name) for name in met.parameters.trained),
        )

    def check(self, step: Step) -> None:
        """As `planner.execution.tape.Runs` has it."""
        named = {name: self.constants[name] for name in map(step.name_of, step.submodule.constants)}
        check({name: self._marks[name] for name in named}, named, step.name)

    def walk(self, steps: Iterable[Step], state: State, perform: Callable[[Step, State], None]) -> None:
        """As `planner.execution.tape.Runs` has it."""
        with self.context:
            self.chain.walk(steps, state, perform)


def _is_more_than_its_stages(submodule: Submodule) -> bool:
    """Whether somebody has hung something on its call, who is to see what it makes whenever it runs."""
    own = type(submodule).forward is Submodule.forward and "forward" not in submodule.__dict__
    return not own or has_hooks(submodule)
