"""Runs of blocks that are only counted: what each takes is known from the cost table, and nothing is run.

All else is the executor itself, on tensors without data: the model's own code around its blocks, the tape,
what is kept and when it goes. So a whole training step is simulated in the time of what lies between blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.cost_model.trace import Trace
from evoplan.model.foreign.attributes import Attributes
from evoplan.model.foreign.calls import Argument, Call, Made
from evoplan.model.foreign.inside import in_autograds_graph
from evoplan.model.foreign.leaves import Numbers, Value
from evoplan.model.foreign.runs import other_buffers
from evoplan.model.running.internals import members, storage_key
from evoplan.model.running.random_state import ImaginedState
from evoplan.model.running.strategy import Strategy
from evoplan.planner.execution.placed import Outputs
from evoplan.planner.fitting.met import Planned
from evoplan.planner.fitting.runs import CallRuns
from evoplan.planner.schedules.schedule import Action

Phase = Literal["blocks", "loss"]


class GhostRuns(CallRuns):
    """As `CallRuns`, of one forward without data.

    Args:
        calls: of the model.
        table: what each call takes.
        trace: is told of it.
        where: what tensors are on.
        passed: is told as "blocks" when the last of them has run, and as "loss" when one runs backward.
    """

    def __init__(
        self,
        blocks: Mapping[str, Planned],
        calls: Sequence[Call],
        table: CostTable,
        trace: Trace,
        where: str,
        passed: Callable[[Phase], None],
    ) -> None:
        super().__init__(blocks)
        self.passed, self.last = passed, calls[-1]
        self.table, self.trace, self.where = table, trace, where
        self.gradient_bytes = {
            name: trace.in_blocks(made.layout.gradient_bytes) if made.differentiable else 0
            for call in calls
            for name, made in zip(call.makes, call.made, strict=True)
        }
        uses = Counter(id(p) for call in calls for p in blocks[call.path].module.parameters())
        # Of parameters of several calls autograd holds the sum until the last of them.
        self._shared = {
            path for path, block in blocks.items() if any(uses[id(p)] > 1 for p in block.module.parameters())
        }

    def accepted(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latest: Mapping[str, Numbers]
    ) -> list[Any]:
        """What the block is planned for, where code before it does otherwise without data."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if structure != call.structure:
            leaves = [None] * len(call.arguments)
        return [_as_planned(*both, self.where) for both in zip(leaves, call.arguments, strict=True)]

    def as_written(self, action: Action) -> bool:
        """Never: the tape calls these, and `run` tells what autograd would have done."""
        return False

    def cut_off(self, call: Call) -> None:
        """Nothing: no hook runs."""

    def run(
        self, call: Call, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]
    ) -> tuple[Any, Outputs]:
        """As `planner.execution.tape.Runs` has it."""
        written, met = recorded and in_autograds_graph(strategy), self.met[call.index]
        if written and not strategy.modules:  # nothing runs again, which needs no generator's state
            met.random = None
        kept, made = super().run(call, strategy, recorded, state)
        if written:  # what it needs of them then is in its cost
            met.random = None
        if written and isinstance(kept, _GhostRecord):
            kept.in_autograds_graph(shared=call.path in self._shared)
            held = kept.cost.as_written.keeps_given if kept.cost.as_written else ()
            met.given = [leaf if at in held else None for at, leaf in enumerate(met.given)]
            met.marks = {}
        if call is self.last:
            self.passed("blocks")
        return kept, made

    def again(self, call: Call, action: Action, state: Mapping[str, Tensor]) -> tuple[Any, Outputs | None]:
        """As `planner.execution.tape.Runs` has it."""
        self.passed("loss")
        assert action.run is not None
        with self._as_met(call), self.met[call.index].random or nullcontext():
            kept, made, _ = self._run(call, action.run.strategy, action.recorded, state)
        return kept, made

    def random_state(self, call: Call) -> Any:
        """As large as a real one."""
        return _Kept(self.where, call.draws)

    def attributes(self, modules: Sequence[nn.Module]) -> Attributes:
        """None: no module runs that would ask for them."""
        return Attributes(())

    def _closed(self, call: Call, kept: Any) -> tuple[int, ...]:
        """As planned."""
        return call.closed

    @contextmanager
    def _as_met(self, call: Call) -> Iterator[None]:
        """The block with the buffers that forward found, which take memory."""
        met = self.met[call.index]
        with other_buffers(self.blocks[call.path].module, met.buffers, met.others):
            yield

    def _run(
        self, call: Call, strategy: Strategy, recorded: bool, state: Mapping[str, Tensor]
    ) -> tuple[Any, Outputs, list[Any]]:
        cost = next(c for c in self.table.options[call.index] if c.strategy == strategy)
        keep = recorded and self.met[call.index].differentiable
        self.trace.took(cost.forward_bytes if keep else cost.discard_bytes)
        leaves = self.leaves(call, state)
        made = list[Tensor]()
        for result in call.made:
            made.append(self._imagined(call, result, leaves, made))
        rest = [result.value if isinstance(result, Value) else None for result in call.results]
        if not keep:
            return None, tuple(made), rest
        own = [made[at] for at in cost.keeps_made]
        return _GhostRecord(call, cost, leaves, own, self), tuple(made), rest

    def _imagined(self, call: Call, made: Made, leaves: list[Any], before: list[Tensor]) -> Tensor:
        """It keeps as much memory as what a run makes, some of it before it."""
        where = made.layout.shape, made.layout.stride
        if made.within is not None:
            lies: Tensor = leaves[made.within].detach().as_strided(*where)
            return lies
        if made.own is not None:
            found = members(self.blocks[call.path].module)
            return (found.parameters | found.buffers)[made.own].detach().as_strided(*where, made.offset)
        if made.storage_bytes == made.layout.nbytes and made.sharing == 1:
            return made.layout.empty(self.where)
        dtype = made.layout.dtype
        there = None if made.beside is None else before[made.beside]
        if there is None or there.dtype != dtype:
            there = torch.empty(made.storage_bytes // dtype.itemsize, dtype=dtype, device=self.where)
        return there.as_strided(*where, made.offset).data  # the model may write into it: no view to autograd


def _as_planned(leaf: Any, argument: Argument, where: str) -> Any:
    if isinstance(argument, Value):
        return argument.value
    there = argument.layout
    if isinstance(leaf, Tensor) and tuple(leaf.shape) == there.shape and leaf.dtype == there.dtype:
        return leaf
    return there.empty(where).requires_grad_(argument.differentiable)


class _Kept(ImaginedState):
    def __init__(self, where: str, draws: bool) -> None:
        super().__init__(where)
        self.where, self.draws = where, draws

    def moved(self) -> bool:
        """Whether the step draws; looked up as a real one is, beside another."""
        ImaginedState(self.where)
        return self.draws


@dataclass
class _GhostRecord:
    """What a recorded run would keep: what it was given, of what it made what it reads, and so many bytes."""

    call: Call
    cost: StepCost
    leaves: list[Any]
    own: list[Tensor]
    runs: GhostRuns
    as_written: bool = False

    def __post_init__(self) -> None:
        self.kept: Tensor | None = torch.empty(
            self.cost.preserved_bytes, dtype=torch.uint8, device=self.runs.where
        )

    def in_autograds_graph(self, shared: bool) -> None:
        """No tape holds it; gradients of its parameters are added to what they have, if they are its own."""
        cost = self.cost.as_written
        assert cost is not None  # as nothing of it runs again
        self.leaves = [
            leaf if at in cost.keeps_given or not isinstance(leaf, Tensor) else leaf.new_empty(0)
            for at, leaf in enumerate(self.leaves)
        ]
        if not shared:
            self.as_written = True
            self.cost = replace(
                self.cost,
                backward_bytes=cost.backward_bytes,
                backward_held_bytes=cost.backward_held_bytes,
            )

    @cached_property
    def live_bytes(self) -> int:
        """Gradients that the cost of its backward counts."""
        alive = self.runs.table.liveness.alive(self.call.index + 1)
        names = {version.tensor for version in alive}.union(self.call.makes)
        return sum(self.runs.gradient_bytes[name] for name in names)

    def vjp(
        self, grads: tuple[Tensor | None, ...], keep: bool = False
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Gradients without data."""
        self.runs.passed("loss")
        met, trace, cost = self.runs.met[self.call.index], self.runs.trace, self.cost
        own = {storage_key(t): trace.in_blocks(t.untyped_storage().nbytes()) for t in self.own}
        self.own.clear()
        size = cost.backward_bytes
        if any(trace.holds(storage) for storage in own):
            more = sum(nbytes for storage, nbytes in own.items() if not trace.holds(storage))
            size = max(size, cost.backward_held_bytes + more)
        # What is preserved and the gradients of the state are in the cost, and live here as well.
        trace.took(size - cost.preserved_bytes - self.live_bytes)
        if not keep:
            self.kept = None
        of_inputs = {at: self._like(self.call.arguments[at]) for at in met.wanted}
        if self.as_written:  # gradients of parameters are added to those there are
            return of_inputs, {}
        return of_inputs, {name: torch.empty_like(p) for name, p in met.parameters.trained.items()}

    def _like(self, argument: Argument) -> Tensor:
        assert not isinstance(argument, Value)  # as a gradient is wanted of it
        return argument.layout.gradient(self.runs.where)
