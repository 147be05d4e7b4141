"""A copy of a module with random numbers in it, and what follows what in it: along which dimensions parts of
its results are made of the same parts of its arguments alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.children import Axis, Child
from evoplan.model.foreign.comparing import Dtypes, close_to, common, confined, joined, largest_of
from evoplan.model.foreign.leaves import Layout, Value
from evoplan.model.foreign.marked import LookedError, Marked
from evoplan.model.foreign.noise import SlicedDraws, WholeDraws

Shapes = list[tuple[int, ...] | None]  # of the arguments' leaves; None where one is no tensor

logger = logging.getLogger(__name__)

CLOSE = 1e-9
# Modules that go over to single precision by themselves are known by this: what is mixed in is far more.
CLOSE_IN_SINGLE = 2e-4
# In the dtype of a call: of the largest number, so many roundings. Not-a-number needs no tolerance.
ROUNDINGS, CLOSE_AT_MOST = 8, 0.1
# Of the largest gradient: a softmax does not change with the bias of keys, of whose gradient nothing but
# rounding is left.
ROUNDING = 1e-4


@dataclass
class Ran:
    """A run and its backward."""

    made: list[Tensor]
    grads: list[Tensor | None]  # of the arguments that want one, then of parameters


class Probe:
    """A module's copy, and arguments of these shapes, else like those that it was called with.

    Args:
        numbers: integers are below this.
        scale: of other numbers.
        dtype: of all that is floating; None: that which each has, under the autocast of the call.
    """

    def __init__(
        self,
        child: Child,
        module: nn.Module,
        shapes: Shapes,
        numbers: int = 2,
        scale: float = 1.0,
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        self.dtype = dtype
        self.child, self.numbers, self.scale = child, numbers, scale
        self.random = torch.Generator().manual_seed(0)
        self.module = self._copy(module)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.leaves = [
            then.value if isinstance(then, Value) else self._tensor(shape or (), then)
            for then, shape in zip(child.arguments, shapes, strict=True)
        ]
        self.wanted = [
            at for at, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        with Dtypes() as dtypes, WholeDraws() as draws:  # type: ignore[no-untyped-call]
            self.made = [tensor.detach() for tensor in self._run(self.leaves)]
        self.draws = draws.found
        self.close = CLOSE_IN_SINGLE if dtypes.coarsest > torch.finfo(torch.float64).eps else CLOSE
        self.rounding = ROUNDING * self.close
        if dtype is None:
            self.close = max(self.close, min(CLOSE_AT_MOST, ROUNDINGS * dtypes.coarsest))
            self.rounding = self.close
        self.weights = [self._normal(tensor) for tensor in self.made]

    def _copy(self, module: nn.Module) -> nn.Module:
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            dtype = self.dtype or parameter.dtype
            data = torch.rand(parameter.shape, generator=self.random, dtype=dtype) - 0.5
            memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = self._tensor(buffer.shape, buffer) if buffer.is_meta else self._on_cpu(buffer)
        return copy.deepcopy(module, memo)

    def _tensor(self, shape: Sequence[int], like: Layout | Tensor) -> Tensor:
        if like.dtype.is_floating_point or like.dtype.is_complex:
            dtype = self.dtype or like.dtype
            if like.dtype.is_complex and not dtype.is_complex:
                dtype = dtype.to_complex()
            return self.scale * torch.randn(tuple(shape), generator=self.random, dtype=dtype)
        most = 2 if like.dtype == torch.bool else self.numbers
        return torch.randint(most, tuple(shape), generator=self.random).to(like.dtype)

    def _on_cpu(self, buffer: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype and buffer.is_floating_point() else buffer.dtype
        return buffer.detach().to("cpu", dtype, copy=True)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random, dtype=torch.float64).to(like.dtype)

    def _run(self, leaves: Sequence[Any], draws: AbstractContextManager[None] | None = None) -> list[Tensor]:
        if draws is None:
            torch.manual_seed(0)  # or, it may draw, nothing would be as before
        args, kwargs = pytree.tree_unflatten(list(leaves), self.child.structure)
        casts = torch.autocast("cpu", self.child.autocast) if self.child.autocast and not self.dtype else None
        with draws or nullcontext(), casts or nullcontext():
            returned, structure = pytree.tree_flatten(self.module(*args, **kwargs))
        if structure != self.child.returned:
            raise ValueError("it returns something else")
        return [leaf for leaf in returned if isinstance(leaf, Tensor)]

    def axes(self) -> Iterator[Axis]:
        """Those that both tests find."""
        follows = {
            (at, dim): self._follows(at, dim)
            for at, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor)
            for dim in range(leaf.ndim)
            if leaf.shape[dim] > 1
        }
        whole = self.differentiated(self.leaves, self.weights)
        # It may ask whether what it is given wants a gradient, which in slices it does in backward alone.
        alike = all(close_to(*pair, self.close) for pair in zip(self.made, whole.made, strict=True))
        for dim in range(self.made[0].ndim):
            axis = self._axis(dim, follows)
            try:
                if axis is not None and alike and self._same(axis, whole):
                    yield axis
            except Exception as error:  # it does not run in slices at all
                logger.debug("%s in slices along %s: %s", self.child.path, axis, error)

    def _follows(self, at: int, dim: int) -> list[set[int] | None]:
        """For each result, the dimensions along which it follows one of an argument's; None: it does not.

        A result that changes elsewhere as well follows along none of them.
        """
        size = self.leaves[at].shape[dim]
        found = [self._follows_part(at, dim, part) for part in {0, size // 2, size - 1}]
        return [common(parts) for parts in zip(*found, strict=True)]

    def _follows_part(self, at: int, dim: int, part: int) -> list[set[int] | None]:
        leaves = list(self.leaves)
        leaves[at] = leaves[at].clone()
        there = leaves[at].narrow(dim, part, 1)
        marked = Marked(whole=not (there.is_floating_point() or there.is_complex()))
        marked.mark(there, torch.ones(there.shape, dtype=torch.bool))
        size = self.leaves[at].shape[dim]
        try:
            with torch.no_grad(), marked.watching():
                made = self._run(leaves)
        except LookedError as error:  # what is done may be another for all
            logger.debug("%s: %s", self.child.path, error)
            return [set() for _ in self.made]
        return [
            confined(~torch.isclose(tensor, before, rtol=0, atol=0) | marked.of(tensor), part, size)
            for tensor, before in zip(made, self.made, strict=True)
        ]

    def _axis(self, dim: int, follows: Mapping[tuple[int, int], list[set[int] | None]]) -> Axis | None:
        """The axis along a dimension of the first result, if what follows what allows for one."""
        cut: dict[int, int] = {}
        for (at, of_leaf), found in follows.items():
            if found[0] is not None and dim in found[0]:
                if at in cut:
                    return None  # two of its dimensions
                cut[at] = of_leaf
        if not cut or any(self._decides(at) for at in range(len(self.leaves)) if at not in cut):
            return None
        results: list[int] = []
        for number in range(len(self.made)):
            along = [follows[at, of_leaf][number] for at, of_leaf in cut.items()]
            known = [dims for dims in along if dims is not None]
            common = set.intersection(*known) if known else set[int]()
            if len(common) != 1:
                return None
            results += common
        if results[0] != dim:
            return None
        tensors = iter(results)
        return Axis(
            dim,
            tuple(cut.get(at) for at in range(len(self.leaves))),
            tuple(next(tensors) if isinstance(then, Layout) else None for then in self.child.results),
            self.made[0].shape[dim],
        )

    def _decides(self, at: int) -> bool:
        """Whether an argument may switch what is done by values that nobody here knows: whole numbers may."""
        leaf = self.leaves[at]
        whole = isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())
        return whole and leaf.dtype != torch.bool and self.child.read[at]

    def differentiated(
        self,
        leaves: Sequence[Any],
        weights: Sequence[Tensor],
        draws: AbstractContextManager[None] | None = None,
    ) -> Ran:
        """A run on these, and its gradients where what it makes has these."""
        leaves = list(leaves)
        inputs = []
        for at in self.wanted:
            leaves[at] = leaves[at].detach().requires_grad_()
            inputs.append(leaves[at])
        made = self._run(leaves, draws)
        pairs = [(t, w) for t, w in zip(made, weights, strict=True) if t.requires_grad]
        outputs, given = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, [*inputs, *self.trained], given, allow_unused=True)
        return Ran([tensor.detach() for tensor in made], list(grads))

    def same(self, axis: Axis) -> bool:
        """Whether it passes the second test alone."""
        return self._same(axis, self.differentiated(self.leaves, self.weights))

    def holds(self, axis: Axis) -> bool:
        """Whether an axis that was found otherwise passes both tests."""
        results = [dim for dim in axis.results if dim is not None]
        for at, dim in enumerate(axis.arguments):
            if dim is not None:
                follows = zip(self._follows(at, dim), results, strict=True)
                if not all(found is None or there in found for found, there in follows):
                    return False
        return self.same(axis)

    def _same(self, axis: Axis, whole: Ran) -> bool:
        """Whether slices of uneven length give what the whole does."""
        dims = [dim for dim in axis.results if dim is not None]
        first = max(1, axis.length // 3)
        few = sorted({0, 1, first, max(1, axis.length - 2), axis.length})
        return all(self._same_in(bounds, axis, dims, whole) for bounds in ([0, first, axis.length], few))

    def _same_in(self, bounds: Sequence[int], axis: Axis, dims: Sequence[int], whole: Ran) -> bool:
        parts = []
        torch.manual_seed(0)
        draws = SlicedDraws(self.draws, axis.length)
        for start, size in ((a, b - a) for a, b in pairwise(bounds)):
            leaves = [
                leaf if dim is None else leaf.narrow(dim, start, size)
                for leaf, dim in zip(self.leaves, axis.arguments, strict=True)
            ]
            weights = [w.narrow(dim, start, size) for w, dim in zip(self.weights, dims, strict=True)]
            parts.append(self.differentiated(leaves, weights, draws.of(slice(start, start + size))))
        made = [
            torch.cat(pieces, dim) for *pieces, dim in zip(*(part.made for part in parts), dims, strict=True)
        ]
        of_inputs = [axis.arguments[at] for at in self.wanted] + [None] * len(self.trained)
        grads = [
            joined(pieces, dim)
            for *pieces, dim in zip(*(part.grads for part in parts), of_inputs, strict=True)
        ]
        pairs = [*zip(made, whole.made, strict=True), *zip(grads, whole.grads, strict=True)]
        largest = max(map(largest_of, whole.grads), default=0.0)
        return all(close_to(one, other, self.close, self.rounding * largest) for one, other in pairs)
