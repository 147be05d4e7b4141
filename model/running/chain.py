"""What can be scheduled: a chain of steps over the state, in groups that a checkpoint may enclose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evoplan.model.config import ModelConfig
from evoplan.model.running.dropout import dropout_mask
from evoplan.model.running.internals import has_hooks, is_tracked, storage_key
from evoplan.model.running.regions import region
from evoplan.model.running.submodule import Submodule

State = dict[str, Tensor]


class Block(nn.Module):
    """Submodules that run one after the other: its children, in the order in which they were assigned."""

    def submodules(self) -> Iterator[tuple[str, Submodule]]:
        """The submodules by name, in the order in which they run."""
        for name, child in self.named_children():
            if isinstance(child, Submodule):
                yield name, child

    def forward(self, *state: Tensor, run: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The state that is there after the block, as `run` makes it of the state before."""
        return run(*state)


def laid_out(**state: Tensor) -> State:
    """The state a chain starts from, without gaps and in the order of its dimensions: copied where it is not.

    Else every step would copy what it reads, inside of kernels where nobody counts it.
    """
    return {name: tensor.contiguous() for name, tensor in state.items()}


class Plannable(nn.Module):
    """A module that is a chain: what has to be known of it to schedule and to run it.

    Attributes:
        config: what it was made from.
        outputs: the state tensors that forward returns, in that order.
        blocks: of a model with one stack.
    """

    outputs: tuple[str, ...]
    blocks: nn.ModuleList

    if TYPE_CHECKING:  # an attribute of most, which a property here would keep from being set

        @property
        def config(self) -> ModelConfig:
            """What it was made from."""

    def stacks(self) -> Iterable[tuple[str, Iterable[Any], Mapping[str, str]]]:
        """In the order in which they run: a stack's name, its blocks, and what its submodules' tensors are
        called here where that differs. Each block lists its `submodules()`. Here: the one stack `blocks`.
        """
        yield "blocks", self.blocks, {}

    def prepare(self, *tensors: Any, **named: Any) -> tuple[State, dict[str, Tensor]]:
        """From forward's arguments, the state that the chain starts from and its constants (masks)."""
        raise NotImplementedError

    def prepared(self, *tensors: Any, **named: Any) -> tuple[State, dict[str, Tensor]]:
        """The same; ValueError where what is given is none of its arguments, or no tensor."""
        try:
            return self.prepare(*tensors, **named)
        except (AttributeError, TypeError):
            self.arguments(*tensors, **named)
            raise

    def arguments(self, *tensors: Any, **named: Any) -> dict[str, Tensor]:
        """Those of forward's arguments that are given, by name.

        Raises:
            ValueError: they are none of this model's; says what it takes.
        """
        whole: Plannable = getattr(self, "stack", self)  # of which ranks have shares
        signature = inspect.signature(whole.prepare)
        try:
            bound = signature.bind(*tensors, **named).arguments
        except TypeError as error:
            raise ValueError(f"inputs: {error}; the model takes {', '.join(signature.parameters)}") from None
        for name in (*whole.config.state, *whole.config.masks):
            given = bound.get(name)
            if not isinstance(given, Tensor) and (given is not None or name in whole.config.state):
                what = "None" if given is None else f"of class {type(given).__name__}"
                raise ValueError(f"inputs: {name} is {what}; give a tensor")
        return {name: tensor for name, tensor in bound.items() if tensor is not None}

    def results(self, state: State) -> tuple[Tensor, ...]:
        """From the state that the chain ends with, what forward returns."""
        return tuple(state[name] for name in self.outputs)

    def draw_seed(self, given: int | None = None) -> int | None:
        """The dropout seed given, or a fresh one for this pass; None where the model drops nothing."""
        if not self.training or not any(getattr(module, "dropout", 0.0) for module in self.modules()):
            return None
        return int(torch.randint(2**62, ()).item()) if given is None else given

    def forward(self, *tensors: Any, dropout_seed: int | None = None, **named: Any) -> tuple[Tensor, ...]:
        """Run the steps one after the other, nothing cut and nothing recomputed.

        Args:
            tensors, named: what `prepare` takes.
            dropout_seed: drawn from torch's default generator when None.
        """
        state, constants = self.prepared(*tensors, **named)
        del tensors, named
        seed = self.draw_seed(dropout_seed)
        chain = Chain.of(self)

        def run(step: Step, state: State) -> None:
            def new_target(*read: Tensor) -> Tensor:
                return step.submodule.new_target(step.tensors(step.named(read), constants, seed))

            with region(step.name):
                state[step.target] = step.called(state, new_target)

        chain.walk(chain.steps, state, run)
        return self.results(state)


@dataclass(frozen=True, eq=False)
class Step:
    """One submodule at its place in the chain.

    Attributes:
        index: position in the chain.
        name: qualified name of the submodule.
        group: number of the block it belongs to.
        block: the block itself.
        names: what the submodule's tensors are called in the state, where that differs.
        draw: its number among the steps that have dropout; what its mask is drawn from.
    """

    index: int
    name: str
    submodule: Submodule
    group: int
    block: nn.Module
    names: Mapping[str, str] = field(default_factory=dict)
    draw: int = 0

    def name_of(self, tensor: str) -> str:
        """What one of the submodule's tensors is called in the state or among the constants."""
        return self.names.get(tensor, tensor)

    @cached_property
    def target(self) -> str:
        """The state tensor that the step rewrites."""
        return self.name_of(self.submodule.target)

    @property
    def makes(self) -> tuple[str, ...]:
        """The state tensors that the step rewrites: its target."""
        return (self.target,)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The state tensors that the step reads, its target first."""
        return tuple(map(self.name_of, self.submodule.reads))

    def named(self, read: Iterable[Tensor]) -> State:
        """The state tensors that the step reads, from their values in that order."""
        return dict(zip(self.reads, read, strict=True))

    def called(self, state: Mapping[str, Tensor], run: Callable[..., Tensor]) -> Tensor:
        """The new target, made by `run`: the submodule is called with the state tensors that it reads."""
        new: Tensor = self.submodule(*(state[name] for name in self.reads), run=run)
        return new

    def tensors(
        self, state: Mapping[str, Tensor], constants: Mapping[str, Tensor], seed: int | None
    ) -> dict[str, Tensor]:
        """Everything the submodule's stages read, by its own names: state, masks, and the dropout mask."""
        tensors = {name: state[self.name_of(name)] for name in self.submodule.reads}
        tensors |= {name: constants[self.name_of(name)] for name in self.submodule.constants}
        mask = dropout_mask(self.submodule, state[self.target], seed, self.draw)
        return tensors if mask is None else {**tensors, "dropout": mask}


@dataclass(frozen=True, eq=False)
class Chain:
    """Steps in the order in which they run. Groups (blocks) are consecutive."""

    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: Plannable) -> Chain:
        """The chain of a model."""
        steps: list[Step] = []
        group = draws = 0
        for stack, blocks, names in model.stacks():
            for number, block in enumerate(blocks):
                for name, submodule in block.submodules():
                    called = {**names, **submodule.names}
                    about = len(steps), f"{stack}.{number}.{name}", submodule, group
                    steps.append(Step(*about, getattr(block, "block", block), called, draws))
                    draws += submodule.dropout_shared_dim is not None
                group += 1
        return cls(tuple(steps), model.outputs)

    def walk(self, steps: Iterable[Step], state: State, run: Callable[[Step, State], None]) -> None:
        """Run steps over the state, which `run` changes, each inside the call of its block.

        A block on which nothing hangs need not be called. Where something does (hooks; parameters that are
        gathered when their block is called) the call holds the state before it until it returns.

        Raises:
            ValueError: a hook has given a block's steps, or what follows them, other tensors than there were.
        """
        for _, group in groupby(steps, key=lambda step: step.group):
            of_block = tuple(group)
            block = of_block[0].block
            if has_hooks(block) or is_tracked():
                _call_block(block, of_block, state, run)
                continue
            for step in of_block:
                run(step, state)

    @cached_property
    def groups(self) -> tuple[range, ...]:
        """The steps of each group."""
        firsts = [s.index for s in self.steps if s.index == 0 or self.steps[s.index - 1].group != s.group]
        return tuple(range(a, b) for a, b in zip(firsts, [*firsts[1:], len(self.steps)], strict=True))

    @cached_property
    def units(self) -> tuple[range, ...]:
        """The steps of each submodule: its own, and those before it that lead in to it."""
        ends = [step.index + 1 for step in self.steps if not step.submodule.leads_in]
        return tuple(range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True))


def _call_block(
    block: nn.Module, steps: Iterable[Step], state: State, run: Callable[[Step, State], None]
) -> None:
    """Run steps of a block inside its call, on the state by position."""
    names = tuple(state)

    def body(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal names
        _check_hook(block, state.values(), tensors)
        state.update(zip(names, tensors, strict=True))
        for step in steps:
            run(step, state)
        names = tuple(state)
        return tuple(state.values())

    results = block(*state.values(), run=body)
    _check_hook(block, state.values(), results)
    state.update(zip(names, results, strict=True))


def _check_hook(block: nn.Module, there: Iterable[Tensor], given: Iterable[Tensor]) -> None:
    # A schedule may run a part of a block alone: what hangs on the block may look on, not take part.
    if [storage_key(tensor) for tensor in there] != [storage_key(tensor) for tensor in given]:
        raise ValueError(
            f"a hook on a block ({type(block).__name__}) puts other tensors in place of its own; "
            "hang it on a submodule of the block"
        )
