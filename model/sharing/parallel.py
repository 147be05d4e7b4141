"""Dynamic axial parallelism: one state sharded over ranks, each running every submodule on its own shard.

A submodule is shared along the independent axis that it declares, so it runs on a shard as it runs on a
chunk; only its context is gathered over the ranks. Between submodules that are shared along different axes
the state is resharded by an all-to-all, a step of the chain like any other. So a schedule for the chain
checkpoints, chunks and coshards each rank's share as it would the whole, and all ranks, which
follow one schedule, meet in the same collectives in the same order.

Source: dynamic axial parallelism, FastFold (Cheng et al. 2022), section 3.2. Its code cuts the gradient in
backward of a gather; here the ranks' gradients are summed first, as each rank uses what was gathered
in its own way.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from evoplan.model.config import InputShape, ModelConfig
from evoplan.model.running.chain import Plannable, State
from evoplan.model.running.layers import FULL
from evoplan.model.running.submodule import Submodule
from evoplan.model.running.view import View
from evoplan.model.sharing.ranks import Enter, Leave, Ranks
from evoplan.model.sharing.reshard import Reshard, SharedWork


@dataclass
class _Block:
    """A block of the parallel chain.

    Attributes:
        block: that it is the rank's share of.
    """

    block: nn.Module
    steps: list[tuple[str, Submodule]] = field(default_factory=list)

    def submodules(self) -> Iterator[tuple[str, Submodule]]:
        return iter(self.steps)


class _Sharer:
    """Walks a chain and gives this rank its share of it, a reshard wherever the state is cut another way.

    Those are as few as can be and as late: what submodules want is fixed, and those that take any cut
    take the one that is there.

    Attributes:
        cuts: for each state tensor, the dimension along which it is cut where the walk has come to.
        constant_cuts: each layout of a constant that some step reads, by its name: constant and dimension,
            None where it is read whole.
    """

    def __init__(self, ranks: Ranks, shapes: Mapping[str, tuple[int, ...]], cuts: Mapping[str, int]) -> None:
        self.ranks, self.shapes, self.cuts = ranks, shapes, dict(cuts)
        self.constant_cuts: dict[str, tuple[str, int | None]] = {}

    def block(self, block: Any, names: Mapping[str, str]) -> _Block:
        """This rank's share of a block."""
        shared = _Block(block)
        for name, submodule in block.submodules():
            for tensor in submodule.reads:
                called = names.get(tensor, tensor)
                cut, wanted = self.cuts[called], submodule.shard_cuts.get(tensor)
                if wanted not in (None, cut):
                    move = cut, wanted, self.shapes[called][cut]
                    reshard = Reshard(tensor, submodule.layout, self.ranks, *move)
                    shared.steps.append((f"reshard_{tensor}_for_{name}", reshard))
                    self.cuts[called] = wanted
            shared.steps.append((name, self.submodule(submodule, names)))
        return shared

    def submodule(self, submodule: Submodule, names: Mapping[str, str]) -> Submodule:
        """A copy that has the submodule's own parameters and knows of the ranks."""
        shared = copy.copy(submodule)
        target = names.get(submodule.target, submodule.target)
        cut = self.cuts[target]
        shared.sharding = SharedWork(
            self.ranks,
            cut,
            self.shapes[target][cut],
            submodule.context_dim,
            self.context_size(submodule, names),
        )
        called: dict[str, str] = {}
        for constant in submodule.constants:
            whole, at = names.get(constant, constant), submodule.shard_cuts.get(constant)
            if at is None:  # every rank reads all of it
                self.constant_cuts[whole] = whole, None
                continue
            called[constant] = f"{whole} cut at {at}"
            self.constant_cuts[called[constant]] = whole, at
        shared.names = called
        return shared

    def context_size(self, submodule: Submodule, names: Mapping[str, str]) -> int:
        """How long the whole context is where the ranks' are joined: as what it is made from."""
        for tensor in submodule.context_inputs:
            if tensor in submodule.reads:
                return self.shapes[names.get(tensor, tensor)][submodule.shard_cuts[tensor]]
        return 0


class ParallelEvoformer(View, Plannable):
    """One rank's share of a model: same parameters, and all ranks together compute the same.

    Gradients of parameters are each rank's part of a sum: add them up after backward, by
    `reduce_gradients` or in DistributedDataParallel's hook.

    Args:
        stack: the model; its `config` knows the shapes of its state.
        ranks: or a process group of torch.distributed, such as that of a device mesh's dimension.
        shape: of the whole inputs; their batch may be any.
        whole: every rank is given the whole state and returns the whole results, and all must compute the
            same loss from them; gradients of inputs are whole, too. Else a rank is given its shards of the
            state and returns its shards of the results, and the loss is the sum of the ranks'. Masks are
            whole either way.

    Attributes:
        input_cuts, output_cuts: the dimension (from the right) along which each state tensor is cut where
            the chain begins and ends.

    Raises:
        ValueError: an axis that is cut is shorter than the ranks are many.
    """

    stack: Plannable

    def __init__(
        self, stack: Plannable, ranks: Ranks | ProcessGroup, shape: InputShape, whole: bool = True
    ) -> None:
        super().__init__(stack)
        self.whole = whole
        self.ranks = ranks if isinstance(ranks, Ranks) else Ranks(ranks)
        self.outputs: tuple[str, ...] = stack.outputs
        self.shapes: Mapping[str, tuple[int, ...]] = stack.config.state_shapes(shape)
        for name, size in ((name, min(shape[1:-1])) for name, shape in self.shapes.items()):
            if size < self.ranks.size:
                raise ValueError(
                    f"{name} has an axis of {size}, which {self.ranks.size} ranks cannot share; "
                    f"use at most {size}"
                )
        # Along the first dimension, where no step cares.
        self.input_cuts = {name: 1 - len(shape) for name, shape in self.shapes.items()}
        for name, cut in reversed(list(self._wanted())):  # as the first step that cares wants it
            self.input_cuts[name] = cut
        sharer, _ = self._share()
        self._constant_cuts, self.output_cuts = sharer.constant_cuts, sharer.cuts

    @property
    def config(self) -> ModelConfig:
        """The whole model's."""
        return self.stack.config

    def spans(self, cuts: Mapping[str, int]) -> dict[str, tuple[slice, ...]]:
        """This rank's part of each state tensor cut so: slices of its dimensions but batch and channels."""
        parts = {}
        for name, cut in cuts.items():
            shape = self.shapes[name]
            span = self.ranks.span(shape[cut])
            parts[name] = tuple(span if dim == cut else FULL for dim in range(1 - len(shape), -1))
        return parts

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """What forward takes of each state tensor."""
        if self.whole:
            return dict(self.shapes)
        return {name: self.ranks.own_shape(self.shapes[name], cut) for name, cut in self.input_cuts.items()}

    def _wanted(self) -> Iterator[tuple[str, int]]:
        """Where each step in turn wants the state cut."""
        for _, blocks, names in self.stack.stacks():
            for block in blocks:
                for _, submodule in block.submodules():
                    for tensor in submodule.reads if submodule.shard_cuts else ():
                        yield names.get(tensor, tensor), submodule.shard_cuts[tensor]

    def _share(self) -> tuple[_Sharer, list[tuple[str, list[_Block], Mapping[str, str]]]]:
        sharer = _Sharer(self.ranks, self.shapes, self.input_cuts)
        stacks = [
            (stack, [sharer.block(block, names) for block in blocks], names)
            for stack, blocks, names in self.stack.stacks()
        ]
        return sharer, stacks

    def stacks(self) -> list[tuple[str, list[_Block], Mapping[str, str]]]:
        """This rank's share of the stack's blocks, reshards included."""
        return self._share()[1]

    def own(self, state: Mapping[str, Tensor]) -> State:
        """This rank's shards of the state that the chain starts from, from the whole one."""
        return {name: self.ranks.own(state[name].detach(), cut) for name, cut in self.input_cuts.items()}

    def prepare(self, *tensors: Any, **named: Any) -> tuple[State, dict[str, Tensor]]:
        """This rank's shards of the state and of the constants."""
        given = inspect.signature(self.stack.prepare).bind(*tensors, **named).arguments
        state = {name: given[name] for name in self.input_cuts}
        for name, expected in self.input_shapes.items():
            if state[name].shape[1 - len(expected) :] != expected[1:]:
                raise ValueError(f"built for {name} of shape {expected}, not {tuple(state[name].shape)}")
        # Constants are made of whole masks: what they need of the state is its shape and type.
        for name, tensor in state.items():
            whole = self.shapes[name][1:]
            shape = (*tensor.shape[: -len(whole)], *whole)
            given[name] = tensor.detach().new_empty(()).expand(shape)
        _, constants = self.stack.prepare(**given)
        if self.whole:
            state = {
                name: Enter.apply(self.ranks, state[name], cut)  # type: ignore[no-untyped-call]
                for name, cut in self.input_cuts.items()
            }
        cuts = self._constant_cuts.items()
        return state, {
            name: constants[whole] if cut is None else self.ranks.own(constants[whole], cut)
            for name, (whole, cut) in cuts
        }

    def results(self, state: State) -> tuple[Tensor, ...]:
        """What forward returns: the outputs, whole or this rank's shards of them."""
        if not self.whole:
            return super().results(state)
        cuts = ((name, self.output_cuts[name]) for name in self.outputs)
        return tuple(
            Leave.apply(self.ranks, state[n], cut, self.shapes[n][cut])  # type: ignore[no-untyped-call]
            for n, cut in cuts
        )

    def reduce_gradients(self) -> None:
        """Add the ranks' gradients of the parameters up, in place; call on every rank after backward."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                self.ranks.sum_(parameter.grad)

    def draw_seed(self, given: int | None = None) -> int | None:
        """As one rank alone, but where none is given all use the first rank's, so that they drop alike."""
        seed = super().draw_seed(given)
        if seed is None or given is not None:
            return seed
        return self.ranks.agree(seed, next(self.parameters()).device)
