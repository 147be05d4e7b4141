"""A stack run block by block, as people write it: what checkpoints, policies and compilers are put around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evoplan.model.running.chain import Chain, Plannable, Step
from evoplan.model.running.pieces import even_spans
from evoplan.model.running.submodule import IndependentAxis, add_residual

# A part of a model over tensors by position: the state, then the constants; returns the new state.
Part = Callable[..., tuple[Tensor, ...]]
# Runs a part on tensors: calls it, or puts something around the call.
Around = Callable[..., tuple[Tensor, ...]]


def again(part: Part, *tensors: Tensor, **more: Any) -> tuple[Tensor, ...]:
    """A part under torch's checkpoint. Nothing is drawn, so that no generator need be kept."""
    done: tuple[Tensor, ...] = checkpoint(
        part, *tensors, use_reentrant=False, preserve_rng_state=False, **more
    )
    return done


def as_is(part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
    """A part, and nothing around it."""
    return part(*tensors)


class ByHand(nn.Module):
    """A stack of which every block is a part: the blocks' own order, nothing planned.

    Args:
        around_block: given each block's part and its tensors.
        around_step: the same for each submodule, inside of its block.
        segments: blocks under one more checkpoint each time, from the outside in: (4, 2) is one around
            every four blocks, and in it one around every two.
        pieces: of each submodule, along its first axis of independent positions; 1: whole.
        pieces_again: whether every piece is checkpointed.
    """

    def __init__(
        self,
        stack: Plannable,
        around_block: Around = as_is,
        around_step: Around = as_is,
        segments: Sequence[int] = (),
        pieces: int = 1,
        pieces_again: bool = True,
    ) -> None:
        super().__init__()
        self.stack, self.outputs = stack, stack.outputs
        self.chain, self.segments = Chain.of(stack), tuple(segments)
        self.around_block, self.around_step = around_block, around_step
        self.pieces, self.pieces_again = pieces, pieces_again

    def forward(
        self, *tensors: Tensor, dropout_seed: int | None = None, **named: Tensor
    ) -> tuple[Tensor, ...]:
        """As the stack's own, of a model without dropout."""
        state, constants = self.stack.prepare(*tensors, **named)
        names = tuple(state), tuple(constants)
        given = (*state.values(), *constants.values())
        del state, tensors, named
        run = partial(self._segment, range(len(self.chain.groups)), self.segments, names)
        return self.stack.results(dict(zip(names[0], run(*given), strict=False)))

    def _segment(
        self, blocks: range, lengths: tuple[int, ...], names: tuple[tuple[str, ...], ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(names[0])
        state, constants = tensors[:count], tensors[count:]
        del tensors
        if not lengths:
            for block in blocks:
                state = self.around_block(partial(self._block, block, names), *state, *constants)
            return state
        for start in range(blocks.start, blocks.stop, lengths[0]):
            inner = range(start, min(start + lengths[0], blocks.stop))
            state = again(partial(self._segment, inner, lengths[1:], names), *state, *constants)
        return state

    def _block(self, block: int, names: tuple[tuple[str, ...], ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(names[0])
        state, constants = dict(zip(names[0], tensors[:count], strict=True)), tensors[count:]
        del tensors
        group = self.chain.groups[block]
        for step in self.chain.steps[group.start : group.stop]:
            part = partial(self._step, step, names)
            (state[step.target],) = self.around_step(part, *(state[n] for n in step.reads), *constants)
        return tuple(state.values())

    def _step(self, step: Step, names: tuple[tuple[str, ...], ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(step.reads)
        constants = dict(zip(names[1], tensors[count:], strict=True))
        of_stages = step.tensors(step.named(tensors[:count]), constants, None)
        if self.pieces == 1:
            return (step.submodule.new_target(of_stages),)
        return (in_pieces(step, of_stages, self.pieces, self.pieces_again),)


def in_pieces(step: Step, tensors: Mapping[str, Tensor], pieces: int, again_each: bool) -> Tensor:
    """The new target, made slice by slice and put together.

    Args:
        again_each: checkpoint every slice.
    """
    submodule = step.submodule
    axis = next(axis for axis in submodule.axes if isinstance(axis, IndependentAxis))
    around = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if again_each else None
    context, names = None, tuple(tensors)
    if submodule.context_inputs:

        def made(*given: Tensor) -> Tensor:
            return submodule.sliced_context(dict(zip(names, given, strict=True)))

        context = around(made, *tensors.values()) if around else made(*tensors.values())

    def new_target(context: Tensor | None, *slices: Tensor) -> Tensor:
        of_slice = dict(zip(names, slices, strict=True))
        return add_residual(of_slice[submodule.target], submodule.update(of_slice, context))

    target = submodule.target
    size = tensors[target].shape[axis.cuts[target]]
    lengths = [span.stop - span.start for span in even_spans(size, min(pieces, size))]
    # Split at once: a slice by itself has backward make a tensor of the whole's size for each.
    cut = {
        name: tensor.split(lengths, axis.cuts[name]) for name, tensor in tensors.items() if name in axis.cuts
    }
    parts = []
    for index in range(len(lengths)):
        slices = [cut[name][index] if name in cut else tensor for name, tensor in tensors.items()]
        parts.append(around(new_target, context, *slices) if around else new_target(context, *slices))
    del slices, context, cut
    return torch.cat(parts, dim=axis.cuts[target])
