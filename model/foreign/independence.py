"""Along which dimensions a module treats each part by itself, found by running it.

Two tests, on a copy in double precision with random parameters, as those of a model that is about to be
trained may be zero and hide everything:

- What becomes not-a-number, or changes, when one part of an argument does. Not-a-number passes through every
  product, also one by zero, so nothing that a part is mixed into stays hidden.
- Slices of uneven length against the whole: results, and gradients of arguments and of parameters.

Where a module runs with smaller sizes than those it was called with, it is tested with these.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evoplan.model.foreign.attributes import settings_of
from evoplan.model.foreign.children import Axis, Child
from evoplan.model.foreign.leaves import Layout, Value
from evoplan.model.running.internals import has_data

Shapes = list[tuple[int, ...] | None]  # of the arguments' leaves; None where one is no tensor

logger = logging.getLogger(__name__)

SMALL = (5, 7, 11, 13, 17, 19)  # what sizes become, each another: odd, so that slices are uneven
MOST_NUMBERS = 2**21  # in arguments, where a module is to be run with the sizes it was called with
MOST_OF_A_SWITCH = 64  # numbers in a buffer that decides what a module does
NUMBERS = (32, 2)  # integers are below these: indices, perhaps, of tables that are short
LARGE = 300.0
CLOSE = 1e-9
# Modules that go over to single precision by themselves are known by this: what is mixed in is far more.
CLOSE_IN_SINGLE = 2e-4


_known: dict[tuple[Any, ...], tuple[Axis, ...]] = {}  # of this process


def independent_axes(module: nn.Module, child: Child) -> tuple[Axis, ...]:
    """The axes of a module as its block calls it.

    Args:
        module: itself; it is copied.
    """
    if not child.plain:
        return ()
    layers = [(name, settings_of(inner)) for name, inner in module.named_modules()]
    tensors = [
        *((name, tensor.shape, tensor.requires_grad) for name, tensor in module.named_parameters()),
        *((name, tensor.shape, _value(tensor)) for name, tensor in module.named_buffers()),
    ]
    told = child.work, str(layers), str(tensors), child.structure, child.arguments, child.results
    try:
        if told not in _known:
            _known[told] = _found(child, module)
        return _known[told]
    except TypeError:  # it is given, or returns, something that has no hash: a slice, say
        return _found(child, module)


def _value(buffer: Tensor) -> Any:
    """Of one that is small enough to be a switch."""
    return buffer.tolist() if has_data(buffer) and buffer.numel() <= MOST_OF_A_SWITCH else None


def _found(child: Child, module: nn.Module) -> tuple[Axis, ...]:
    before = random.getstate()
    for shapes, numbers in product(_smaller(child, module), NUMBERS):
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                return tuple(_axes(child, module, shapes, numbers))
        except Exception as error:  # somebody else's code, with sizes that nobody has told it of
            logger.debug("%s with shapes %s: %s", child.path, shapes, error)
        finally:
            random.setstate(before)
    return ()


def _axes(child: Child, module: nn.Module, shapes: Shapes, numbers: int) -> Iterator[Axis]:
    full = shapes == _shapes(child)
    for axis in _Probe(child, module, shapes, numbers).axes():
        found = axis if full else _at_full_length(child, module, shapes, numbers, axis)
        if found is not None and _in_full(child, module, shapes, numbers, found):
            yield found


def _at_full_length(child: Child, module: nn.Module, shapes: Shapes, numbers: int, axis: Axis) -> Axis | None:
    """The same axis, where it is as long as it is called with and all else is small.

    What is far apart may be mixed, by a dilated convolution, say, where what is near is not.
    """
    try:
        probe = _Probe(child, module, _long(child, shapes, axis), numbers)
    except Exception as error:
        logger.debug("%s with %s in full: %s", child.path, axis, error)
        return None
    return next((found for found in probe.axes() if found.dim == axis.dim), None)


def _long(child: Child, shapes: Shapes, axis: Axis) -> Shapes:
    """The same shapes, but for one axis, which is as long as it is called with."""
    long = list(shapes)
    for at, dim in enumerate(axis.arguments):
        then, shape = child.arguments[at], shapes[at]
        if dim is not None and isinstance(then, Layout) and shape is not None:
            long[at] = (*shape[:dim], then.shape[dim], *shape[dim + 1 :])
    return long


def _in_full(child: Child, module: nn.Module, shapes: Shapes, numbers: int, axis: Axis) -> bool:
    """Whether slices give what the whole does where arguments are large numbers, and where all is as long as
    it is called with, if that is not much.

    A module may do otherwise above some size: experts with room for so many tokens, values that are clipped.
    """
    full = _shapes(child)
    largest = full if _are_few(full) else _long(child, shapes, axis)
    try:
        return _Probe(child, module, largest, numbers, scale=LARGE).same(axis)
    except Exception as error:
        logger.debug("%s with shapes %s: %s", child.path, largest, error)
        return False


def _are_few(shapes: Shapes) -> bool:
    return sum(prod(shape) for shape in shapes if shape is not None) <= MOST_NUMBERS


def _shapes(child: Child) -> Shapes:
    return [then.shape if isinstance(then, Layout) else None for then in child.arguments]


def _smaller(child: Child, module: nn.Module) -> Iterator[Shapes]:
    """Shapes to try, the smallest first: which sizes are a module's own, and have to stay, nobody tells.

    Parameters have them, or they are the last of what is differentiated, or of what the first argument is.
    """
    shapes, own = _shapes(child), {n for p in (*module.parameters(), *module.buffers()) for n in p.shape}
    first = next((shape for shape in shapes if shape), ())
    wanted = [shape for shape, wants in zip(shapes, child.wanted, strict=True) if shape and wants] or [first]
    free = {size for shape in wanted for size in shape}
    ends = [
        [False for _ in shapes],
        [shape in wanted for shape in shapes],
        [shape == first for shape in shapes],
    ]
    tried = []
    for stay, last in [(own, ends[0]), *((set[int](), end) for end in ends[1:])]:
        sizes = _small(free - stay, own)
        smaller: Shapes = [
            None if shape is None else _with(shape, sizes, keep_last)
            for shape, keep_last in zip(shapes, last, strict=True)
        ]
        if smaller != shapes and smaller not in tried:
            tried.append(smaller)
    yield from tried
    if _are_few(shapes):
        yield shapes


def _with(shape: tuple[int, ...], sizes: Mapping[int, int], keep_last: bool) -> tuple[int, ...]:
    new = tuple(sizes.get(size, size) for size in shape)
    return (*new[:-1], shape[-1]) if keep_last and shape else new


def _small(sizes: set[int], own: set[int]) -> dict[int, int]:
    """Small ones in place of large ones, each another and none that a parameter has."""
    new = iter(size for size in SMALL if size not in own | sizes)
    return dict(zip(sorted(size for size in sizes if size > max(SMALL)), new, strict=False))


@dataclass
class _Ran:
    made: list[Tensor]
    grads: list[Tensor | None]  # of the arguments that want one, then of parameters


class _Probe:
    """A module's copy, and arguments of these shapes, else like those that it was called with.

    Args:
        numbers: integers are below this.
        scale: of other numbers.
    """

    def __init__(
        self, child: Child, module: nn.Module, shapes: Shapes, numbers: int = 2, scale: float = 1.0
    ) -> None:
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
        with _Dtypes() as dtypes:  # type: ignore[no-untyped-call]
            self.made = [tensor.detach() for tensor in self._run(self.leaves)]
        self.close = CLOSE_IN_SINGLE if dtypes.single else CLOSE
        self.weights = [self._normal(tensor) for tensor in self.made]

    def _copy(self, module: nn.Module) -> nn.Module:
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            data = torch.rand(parameter.shape, generator=self.random, dtype=torch.float64) - 0.5
            memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = self._tensor(buffer.shape, buffer) if buffer.is_meta else _on_cpu(buffer)
        return copy.deepcopy(module, memo)

    def _tensor(self, shape: Sequence[int], like: Layout | Tensor) -> Tensor:
        if like.dtype.is_floating_point or like.dtype.is_complex:
            dtype = torch.complex128 if like.dtype.is_complex else torch.float64
            return self.scale * torch.randn(tuple(shape), generator=self.random, dtype=dtype)
        most = 2 if like.dtype == torch.bool else self.numbers
        return torch.randint(most, tuple(shape), generator=self.random).to(like.dtype)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random, dtype=torch.float64).to(like.dtype)

    def _run(self, leaves: Sequence[Any]) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.child.structure)
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
        whole = self._differentiated(self.leaves, self.weights)
        # It may ask whether what it is given wants a gradient, which in slices it does in backward alone.
        alike = all(_close(*pair, self.close) for pair in zip(self.made, whole.made, strict=True))
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
        return [_common(parts) for parts in zip(*found, strict=True)]

    def _follows_part(self, at: int, dim: int, part: int) -> list[set[int] | None]:
        leaves = list(self.leaves)
        leaves[at] = leaves[at].clone()
        there = leaves[at].narrow(dim, part, 1)
        if there.is_floating_point() or there.is_complex():
            there.fill_(float("nan"))
        else:
            there.copy_(~there if there.dtype == torch.bool else 1 - there)
        size = self.leaves[at].shape[dim]
        return [
            _confined(tensor, before, part, size)
            for tensor, before in zip(self._unrecorded(leaves), self.made, strict=True)
        ]

    def _unrecorded(self, leaves: Sequence[Any]) -> list[Tensor]:
        with torch.no_grad():
            return self._run(leaves)

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

    def _differentiated(self, leaves: Sequence[Any], weights: Sequence[Tensor]) -> _Ran:
        leaves = list(leaves)
        inputs = []
        for at in self.wanted:
            leaves[at] = leaves[at].detach().requires_grad_()
            inputs.append(leaves[at])
        made = self._run(leaves)
        pairs = [(t, w) for t, w in zip(made, weights, strict=True) if t.requires_grad]
        outputs, given = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, [*inputs, *self.trained], given, allow_unused=True)
        return _Ran([tensor.detach() for tensor in made], list(grads))

    def same(self, axis: Axis) -> bool:
        """Whether it passes the second test alone."""
        return self._same(axis, self._differentiated(self.leaves, self.weights))

    def _same(self, axis: Axis, whole: _Ran) -> bool:
        """Whether slices of uneven length give what the whole does."""
        dims = [dim for dim in axis.results if dim is not None]
        first = max(1, axis.length // 3)
        few = sorted({0, 1, first, max(1, axis.length - 2), axis.length})
        return all(self._same_in(bounds, axis, dims, whole) for bounds in ([0, first, axis.length], few))

    def _same_in(self, bounds: Sequence[int], axis: Axis, dims: Sequence[int], whole: _Ran) -> bool:
        parts = []
        for start, size in ((a, b - a) for a, b in pairwise(bounds)):
            leaves = [
                leaf if dim is None else leaf.narrow(dim, start, size)
                for leaf, dim in zip(self.leaves, axis.arguments, strict=True)
            ]
            weights = [w.narrow(dim, start, size) for w, dim in zip(self.weights, dims, strict=True)]
            parts.append(self._differentiated(leaves, weights))
        made = [
            torch.cat(pieces, dim) for *pieces, dim in zip(*(part.made for part in parts), dims, strict=True)
        ]
        of_inputs = [axis.arguments[at] for at in self.wanted] + [None] * len(self.trained)
        grads = [
            _joined(pieces, dim)
            for *pieces, dim in zip(*(part.grads for part in parts), of_inputs, strict=True)
        ]
        pairs = [*zip(made, whole.made, strict=True), *zip(grads, whole.grads, strict=True)]
        return all(_close(one, other, self.close) for one, other in pairs)


def _on_cpu(buffer: Tensor) -> Tensor:
    wide = torch.float64 if buffer.is_floating_point() else buffer.dtype
    return buffer.detach().to("cpu", wide, copy=True)


class _Dtypes(TorchDispatchMode):
    """Whether a module goes over to single precision, or less, by itself."""

    single = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            self.single |= isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.itemsize < 8
        return out


def _common(found: Sequence[set[int] | None]) -> set[int] | None:
    """What holds for all parts that anything follows."""
    known = [dims for dims in found if dims is not None]
    return set.intersection(*known) if known else None


def _confined(tensor: Tensor, before: Tensor, part: int, size: int) -> set[int] | None:
    """The dimensions of which only that part has changed; None if nothing has."""
    changed = ~torch.isclose(tensor, before, rtol=0, atol=0)
    if not changed.any():
        return None
    found = set()
    for dim in range(tensor.ndim):
        if tensor.shape[dim] == size:
            others = [other for other in range(size) if other != part]
            if not changed.index_select(dim, torch.tensor(others)).any():
                found.add(dim)
    return found


def _joined(pieces: Sequence[Tensor | None], dim: int | None) -> Tensor | None:
    present = [piece for piece in pieces if piece is not None]
    if len(present) < len(pieces):
        return present[0] if present and dim is None else None
    return sum(present[1:], start=present[0]) if dim is None else torch.cat(present, dim)


def _close(one: Tensor | None, other: Tensor | None, close: float) -> bool:
    if one is None or other is None:
        return one is None and other is None
    if one.shape != other.shape or not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        return False
    return not one.numel() or bool((one - other).abs().max() <= close * other.abs().max())
