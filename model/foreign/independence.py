"""Along which dimensions a module treats each part by itself, found by running it.

Two tests, on a copy in double precision with random parameters, as those of a model that is about to be
trained may be zero and hide everything:

- What becomes not-a-number, or changes, when one part of an argument does. Not-a-number passes through every
  product, also one by zero, so nothing that a part is mixed into stays hidden.
- Slices of uneven length against the whole: results, and gradients of arguments and of parameters.

Both are made once more in the dtypes that it is called in, as it may do otherwise there. Where a module runs
with smaller sizes than those it was called with, it is tested with these.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from evoplan.model.foreign.attributes import settings_of
from evoplan.model.foreign.children import Axis, Child
from evoplan.model.foreign.leaves import Layout
from evoplan.model.foreign.probing import Probe, Shapes
from evoplan.model.running.internals import has_data

logger = logging.getLogger(__name__)

SMALL = (5, 7, 11, 13, 17, 19)  # what sizes become, each another: odd, so that slices are uneven
MOST_NUMBERS = 2**21  # in arguments, where a module is to be run with the sizes it was called with
MOST_OF_A_SWITCH = 64  # numbers in a buffer that decides what a module does
NUMBERS = (32, 2)  # integers are below these: indices, perhaps, of tables that are short
LARGE = 300.0

_known: dict[tuple[Any, ...], tuple[Axis, ...]] = {}  # of this process


def independent_axes(module: nn.Module, child: Child) -> tuple[Axis, ...]:
    """The axes of a module as its block calls it.

    Args:
        module: itself; it is copied.
    """
    if not child.plain:
        return ()
    layers = [(name, settings_of(inner)) for name, inner in module.named_modules()]
    told = str(layers), about_axes(module, child)
    if told not in _known:
        _known[told] = _found(child, module)
    return _known[told]


def about_axes(module: nn.Module, child: Child) -> str:
    """What its axes follow from besides its layers and their settings."""
    tensors = [
        *((name, t.shape, t.dtype, t.requires_grad) for name, t in module.named_parameters()),
        *((name, tensor.shape, tensor.dtype, _value(tensor)) for name, tensor in module.named_buffers()),
    ]
    called = child.structure, child.arguments, child.read, child.autocast
    return repr((child.work, tensors, called, child.returned, child.results))


def _value(buffer: Tensor) -> Any:
    """Of one that is small enough to be a switch."""
    return buffer.tolist() if has_data(buffer) and buffer.numel() <= MOST_OF_A_SWITCH else None


def _found(child: Child, module: nn.Module) -> tuple[Axis, ...]:
    before = random.getstate()
    for shapes, numbers in product(smaller(child, module), NUMBERS):
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                return tuple(_axes(child, module, shapes, numbers))
        except Exception as error:  # somebody else's code, with sizes that nobody has told it of
            logger.debug("%s with shapes %s: %s", child.path, shapes, error)
        finally:
            random.setstate(before)
    return ()


def _axes(child: Child, module: nn.Module, shapes: Shapes, numbers: int) -> Iterator[Axis]:
    full = shapes == shapes_of(child)
    for axis in Probe(child, module, shapes, numbers).axes():
        found = axis if full else _at_full_length(child, module, shapes, numbers, axis)
        about = child, module, shapes, numbers
        if found is not None and _in_full(*about, found) and _in_its_dtypes(*about, found):
            yield found


def _at_full_length(child: Child, module: nn.Module, shapes: Shapes, numbers: int, axis: Axis) -> Axis | None:
    """The same axis, where it is as long as it is called with and all else is small.

    What is far apart may be mixed, by a dilated convolution, say, where what is near is not.
    """
    try:
        probe = Probe(child, module, _long(child, shapes, axis), numbers)
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
    full = shapes_of(child)
    largest = full if numbers_in(full) <= MOST_NUMBERS else _long(child, shapes, axis)
    try:
        probe = Probe(child, module, largest, numbers, scale=LARGE)
        # Slices show what numbers do; what whole numbers might have done, their marks.
        return probe.holds(axis) if _cuts_whole_numbers(child, axis) else probe.same(axis)
    except Exception as error:
        logger.debug("%s with shapes %s: %s", child.path, largest, error)
        return False


def _cuts_whole_numbers(child: Child, axis: Axis) -> bool:
    layouts = [then for then, dim in zip(child.arguments, axis.arguments, strict=True) if dim is not None]
    return any(not then.dtype.is_floating_point for then in layouts if isinstance(then, Layout))


def _in_its_dtypes(child: Child, module: nn.Module, shapes: Shapes, numbers: int, axis: Axis) -> bool:
    """Whether the axis is one in the dtypes that the module is called in: it may quantise there, say."""
    dtypes = {tensor.dtype for tensor in (*module.parameters(), *module.buffers())}
    dtypes |= {then.dtype for then in child.arguments if isinstance(then, Layout)}
    dtypes = {dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}
    if child.autocast is None and dtypes <= {torch.float64, torch.complex128}:
        return True
    try:
        return Probe(child, module, _long(child, shapes, axis), numbers, dtype=None).holds(axis)
    except Exception as error:
        logger.debug("%s along %s in its dtypes: %s", child.path, axis, error)
        return False


def numbers_in(shapes: Shapes) -> int:
    """How many there are in tensors of these shapes."""
    return sum(prod(shape) for shape in shapes if shape is not None)


def shapes_of(child: Child) -> Shapes:
    """Those of its arguments."""
    return [then.shape if isinstance(then, Layout) else None for then in child.arguments]


def smaller(child: Child, module: nn.Module, small: Sequence[int] = SMALL) -> Iterator[Shapes]:
    """Shapes to try, the smallest first: which sizes are a module's own, and have to stay, nobody tells.

    Parameters have them, or they are the last of what is differentiated, or of what the first argument is.

    Args:
        small: what larger sizes become.
    """
    shapes, own = shapes_of(child), {n for p in (*module.parameters(), *module.buffers()) for n in p.shape}
    first = next((shape for shape in shapes if shape), ())
    wanted = [shape for shape, wants in zip(shapes, child.wanted, strict=True) if shape and wants] or [first]
    free = {size for shape in wanted for size in shape}
    ends = [
        [False for _ in shapes],
        [shape in wanted for shape in shapes],
        [shape == first for shape in shapes],
        # Of a mask over pairs, whose sizes may happen to be those of positions by widths, no last one is.
        [wants and shape is not None for shape, wants in zip(shapes, child.wanted, strict=True)],
        [at == next((at for at, shape in enumerate(shapes) if shape), None) for at in range(len(shapes))],
    ]
    tried = []
    for stay, last in [(own, ends[0]), *((set[int](), end) for end in ends[1:])]:
        sizes = _small(free - stay, own, small)
        smaller: Shapes = [
            None if shape is None else _with(shape, sizes, keep_last)
            for shape, keep_last in zip(shapes, last, strict=True)
        ]
        if smaller != shapes and smaller not in tried:
            tried.append(smaller)
    yield from tried
    if numbers_in(shapes) <= MOST_NUMBERS:
        yield shapes


def _with(shape: tuple[int, ...], sizes: Mapping[int, int], keep_last: bool) -> tuple[int, ...]:
    new = tuple(sizes.get(size, size) for size in shape)
    return (*new[:-1], shape[-1]) if keep_last and shape else new


def _small(sizes: set[int], own: set[int], small: Sequence[int]) -> dict[int, int]:
    """Small ones in place of large ones, each another and none that a parameter has."""
    new = iter(size for size in small if size not in own | sizes)
    return dict(zip(sorted(size for size in sizes if size > max(small)), new, strict=False))
