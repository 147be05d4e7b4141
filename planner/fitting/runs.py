"""How calls of blocks run under a tape: by the block's own forward, as it was called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evoplan.model.foreign.attributes import Attributes, plain_tensors, values_of
from evoplan.model.foreign.calls import Call, FromState
from evoplan.model.foreign.fingerprints import alike, fingerprint
from evoplan.model.foreign.inside import Inside, in_autograds_graph
from evoplan.model.foreign.leaves import Numbers, Value, twins_in
from evoplan.model.foreign.runs import CallRun, discarded, other_buffers
from evoplan.model.running.chain import State
from evoplan.model.running.context import Context
from evoplan.model.running.internals import members, storage_key
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.random_state import RandomState
from evoplan.model.running.strategy import Record, Strategy
from evoplan.model.running.unchanged import Mark, changed, check, marks, put_back
from evoplan.planner.execution.placed import Outputs
from evoplan.planner.fitting.met import MetCall, Planned
from evoplan.planner.schedules.schedule import Action


class CallRuns:
    """Of one forward of a model that was written elsewhere.

    Args:
        blocks: by path in the model.
    """

    def __init__(self, blocks: Mapping[str, Planned]) -> None:
        self.blocks = blocks
        self.met: dict[int, MetCall] = {}

    def accepted(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latest: Mapping[str, Numbers]
    ) -> list[Any]:
        """The leaves of what a block is called with; ChangedCallError where they are not as planned."""
        return call.check(args, kwargs, latest)

    def meet(self, call: Call, leaves: Sequence[Any]) -> tuple[Tensor, ...]:
        """Look a call up as it is at this forward, about to run on these leaves: what has a gradient."""
        with self.blocks[call.path].lock:
            met, modules = self._look_up(call, leaves)
        if any(inner._forward_hooks for inner in modules[1:]):
            self.cut_off(call)
        return *(leaves[at] for at in met.wanted), *met.parameters.trained.values()

    def _look_up(self, call: Call, leaves: Sequence[Any]) -> tuple[MetCall, list[nn.Module]]:
        """A call as it is met, and the block and all modules in it."""
        block = self.blocks[call.path]
        module = block.module
        twins = twins_in(leaves)
        wanted = tuple(
            at
            for at, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad and at not in twins
        )
        given = [
            None if isinstance(argument, FromState)
            else leaf.detach() if isinstance(leaf, Tensor)
            else leaf
            for leaf, argument in zip(leaves, call.arguments, strict=True)
        ]  # fmt: skip
        found = members(module)
        parameters = Parameters(module, found.parameters)
        others = {name: buffer for name, buffer in found.buffers.items() if name not in call.changes}
        met = MetCall(
            given,
            wanted,
            twins,
            parameters,
            Context.of_steps(),
            marks(_tensors(given)),
            self.attributes(found.modules),
            {name: module.get_buffer(name).detach().clone() for name in call.changes},
            others,
            marks(others),
            self.plain(call),
            self.random_state(call),
        )
        modes = tuple(inner.training for inner in found.modules if inner._buffers)
        if modes not in block.modes:
            met.values = values_of(others)
            block.modes.add(modes)
        self.met[call.index] = met
        return met, found.modules

    def plain(self, call: Call) -> dict[str, Mark]:
        """Marks of tensors that a call reads and that are neither parameters nor buffers."""
        return plain_tensors(self.blocks[call.path].module) if call.plain else {}

    def as_written(self, action: Action) -> bool:
        """Whether a step of forward runs in autograd's own graph."""
        return action.run is not None and action.recorded and in_autograds_graph(action.run.strategy)

    def written(
        self,
        call: Call,
        strategy: Strategy,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[Any],
    ) -> Any:
        """What such a step returns, called with arguments of these leaves."""
        block = self.blocks[call.path]
        inside = self._inside(call, strategy, recorded=True)
        with block.lock:
            if not strategy.modules:
                with inside.recording(block.forward) as recording:
                    return recording(*args, **kwargs)
            return self._run_by_autograd(call, inside, args, kwargs, leaves)

    def _run_by_autograd(
        self,
        call: Call,
        inside: Inside,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[Any],
    ) -> Any:
        """A block that autograd runs again."""
        self._look_up(call, leaves)
        met = self.met[call.index]
        met.given = []  # autograd holds them, and sees whether they are written into
        inside.around = partial(self._once_more, call)
        with met.context, inside.recording(self.blocks[call.path].forward) as recording:
            result = recording(*args, **kwargs)
        met.has_run(call, self.blocks[call.path])
        met.random = None  # what runs again has its own
        return result

    @contextmanager
    def _once_more(self, call: Call) -> Iterator[None]:
        """What a block that autograd runs again has to find as forward found it."""
        met = self.met[call.index]
        met.parameters.check(call.name)
        with self.blocks[call.path].lock, self._as_met(call), met.parameters.installed(), met.context:
            yield

    def undo(self, call: Call) -> None:
        """Have the block be as it was met, for another run."""
        met, module = self.met[call.index], self.blocks[call.path].module
        met.attributes.put()
        put_back((module.get_buffer(name), value) for name, value in met.buffers.items())
        if met.random is not None:
            met.random.reset()

    def cut_off(self, call: Call) -> None:
        """Say what becomes of hooks within a block."""
        kind = type(self.blocks[call.path].module).__name__
        warnings.warn(  # once for all of them
            f"hooks inside of blocks of {kind} see tensors that are cut off from the model's graph; what "
            "they keep has no gradient there",
            stacklevel=3,
        )

    def random_state(self, call: Call) -> RandomState | None:
        """Where the generators stand before a call."""
        return RandomState()

    def attributes(self, modules: Sequence[nn.Module]) -> Attributes:
        """What the modules of a block have besides tensors before a call."""
        return Attributes(modules)

    def run(
        self, call: Call, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]
    ) -> tuple[Record | None, Outputs]:
        """As `planner.execution.tape.Runs` has it."""
        met = self.met[call.index]
        with self.blocks[call.path].lock:
            kept, made, met.returned = self._run(call, strategy, recorded, state)
            met.closed = self._closed(call, kept)
            if not recorded or not met.differentiable:
                met.fingerprint = fingerprint(made)
            met.has_run(call, self.blocks[call.path])
        return kept, made

    def closed(self, call: Call, made: Outputs) -> Iterable[Tensor]:
        """As `planner.execution.tape.Runs` has it."""
        return [made[at] for at in self.met[call.index].closed]

    def _closed(self, call: Call, kept: Any) -> tuple[int, ...]:
        """Places of what is made that no gradient goes through, as a record has it."""
        return call.closed if kept is None else tuple(kept.closed)

    def _inside(self, call: Call, strategy: Strategy, recorded: bool) -> Inside:
        """How a call runs; what runs again in backward is tried the first time that it does."""
        block = self.blocks[call.path]
        inside = Inside(strategy, block.module, call.children, call.settings, call.knobs)
        if recorded and strategy.modules and strategy not in block.tried:
            inside.tries = True
            block.tried.add(strategy)
        return inside

    def _run(
        self, call: Call, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]
    ) -> tuple[Any, Outputs, list[Any]]:
        """The record, what the call makes, and what else it returns."""
        met, block = self.met[call.index], self.blocks[call.path]
        leaves, forward = self.leaves(call, state), block.forward
        with met.context:
            inside = self._inside(call, strategy, recorded)
            inside.around = lambda: met.context
            if recorded and met.differentiable:
                kept = CallRun(call, forward, leaves, met.wanted, met.parameters, inside)
                made, returned = kept.take()
            else:
                kept = None
                with torch.no_grad():
                    made, returned = discarded(call, forward, leaves, inside)
        rest = [
            leaf if isinstance(result, Value) else None
            for leaf, result in zip(returned, call.results, strict=True)
        ]
        return kept, _apart(made, leaves), rest

    def leaves(self, call: Call, state: Mapping[str, Tensor]) -> list[Any]:
        """All leaves of a call's arguments, those from the state among them."""
        met, leaves = self.met[call.index], list[Any]()
        for at, (leaf, argument) in enumerate(zip(met.given, call.arguments, strict=True)):
            if at in met.twins:
                leaf = leaves[met.twins[at]]
            elif isinstance(argument, FromState):
                leaf = state[argument.name].detach()  # another object than any before
            leaves.append(leaf)
        return leaves

    def again(
        self, call: Call, action: Action, state: Mapping[str, Tensor]
    ) -> tuple[Record | None, Outputs | None]:
        """As `planner.execution.tape.Runs` has it."""
        met = self.met[call.index]
        assert action.run is not None
        met.parameters.check(call.name)
        block = self.blocks[call.path]
        with block.lock, self._as_met(call), met.parameters.installed(), met.random or nullcontext():
            kept, made, _ = self._run(call, action.run.strategy, action.recorded, state)
        if kept is not None and not set(met.closed) <= set(self._closed(call, kept)):
            raise RuntimeError(
                f"{call.name} wants a gradient of what it had detached when the plan was made; fit the model "
                "again for what it does now"
            )
        if not alike(fingerprint(made), met.fingerprint):
            raise RuntimeError(
                f"{call.name} does not do the same when it runs again: it draws random numbers that are not "
                "torch's, or changes something of its own; have it made `whole` by a plan without a budget"
            )
        return kept, made

    @contextmanager
    def _as_met(self, call: Call) -> Iterator[None]:
        """The block as forward found it, but for its parameters; ChangedError where that is not known."""
        met, module = self.met[call.index], self.blocks[call.path].module
        check(met.of_others, met.others, call.name)
        now = self.plain(call)
        for name in call.plain:
            if name in met.plain and met.plain[name] != now.get(name):
                raise changed(name, call.name)
        with met.attributes.installed(), other_buffers(module, met.buffers, met.others):
            yield

    def vjp(
        self, call: Call, kept: Any, grads: tuple[Tensor | None, ...], keep: bool
    ) -> tuple[Tensor | None, ...]:
        """As `planner.execution.tape.Runs` has it."""
        met = self.met[call.index]
        with self.blocks[call.path].lock, self._as_met(call):
            of_inputs, of_parameters = kept.vjp(grads, keep)
        return (
            *(of_inputs.get(at) for at in met.wanted),
            *(of_parameters.get(name) for name in met.parameters.trained),
        )

    def check(self, call: Call) -> None:
        """As `planner.execution.tape.Runs` has it."""
        met = self.met[call.index]
        check(met.marks, _tensors(met.given), call.name)

    def walk(self, calls: Iterable[Call], state: State, perform: Callable[[Call, State], None]) -> None:
        """As `planner.execution.tape.Runs` has it."""
        for call in calls:
            perform(call, state)


def _tensors(leaves: Sequence[Any]) -> dict[str, Tensor]:
    return {f"argument {at}": leaf for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def _apart(made: Outputs, leaves: Sequence[Any]) -> Outputs:
    """What was made; where it lies in what was given, as a view, which autograd takes for another tensor."""
    given = {storage_key(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    return tuple(tensor.view_as(tensor) if storage_key(tensor) in given else tensor for tensor in made)
