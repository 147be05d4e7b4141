"""Whether a block makes the same with its knobs turned: chunks are meant to, and other people's code may not.

A copy in double precision with random parameters is run with its knobs as they are and turned, and both are
differentiated. Sizes are small where they can be, but larger than what the knobs are turned to: in chunks
that are longer than all there is, everything is the same. Where it is not much, it is run once more as large
as it is called.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from evoplan.model.foreign.attributes import settings_of
from evoplan.model.foreign.children import Child
from evoplan.model.foreign.independence import NUMBERS, SMALL, numbers_in, shapes_of, smaller
from evoplan.model.foreign.knobs import Knob, Turned
from evoplan.model.foreign.probing import ROUNDING, Probe, Ran, Shapes
from evoplan.model.running.internals import other_forwards

logger = logging.getLogger(__name__)

# Code that casts to single precision by itself may run in nothing else.
DTYPES = torch.float64, torch.float32
CLOSE_IN_SINGLE = 1e-5
MOST_NUMBERS = 2**23  # in arguments: larger ones are not run


def what_differs(
    module: nn.Module, child: Child, knobs: Mapping[str, Knob], values: Mapping[str, str]
) -> str | None:
    """Why a block with its knobs at these values is not to be trusted; None: its results are equal.

    Args:
        module: the block; it is copied.
        child: what it is called with.
        values: as text, by name.
    """
    before, full, equal, error = random.getstate(), shapes_of(child), None, "it is too large to be tried"
    several = [*_shapes(module, child, knobs, values)]
    for dtype, shapes, numbers in product(DTYPES, several, NUMBERS):
        if equal is not None and (shapes, dtype) != (full, equal):
            continue
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                found = _compared(Probe(child, module, shapes, numbers, dtype=dtype), knobs, values)
        except Exception as raised:  # somebody else's code, with sizes and values that nobody has told it of
            logger.debug("%s with %s and shapes %s: %s", child.path, values, shapes, raised)
            said = str(raised).partition("\n")[0][:100]
            error = f"it does not run so in a trial ({type(raised).__name__}: {said})"
            continue
        finally:
            random.setstate(before)
        if found is not None:
            return found
        if shapes == full:
            return None
        equal = dtype
    return error if equal is None else None


def _shapes(
    module: nn.Module, child: Child, knobs: Mapping[str, Knob], values: Mapping[str, str]
) -> Iterator[Shapes]:
    """To run it with: some above what the knobs are turned to, and last those that it is called with."""
    turned = [knobs[name].value(text) for name, text in values.items()]
    most = max((value for value in turned if type(value) is int), default=0)
    tried = []
    for least in (most + most // 2 + 1, most + 1):  # one whole chunk, and some over
        small = SMALL if least <= min(SMALL) else range(least, least + len(SMALL))
        for shapes in smaller(child, module, small):
            if shapes not in tried and shapes != shapes_of(child) and numbers_in(shapes) <= MOST_NUMBERS:
                tried.append(shapes)
    yield from tried
    if numbers_in(shapes_of(child)) <= MOST_NUMBERS:
        yield shapes_of(child)


def _compared(probe: Probe, knobs: Mapping[str, Knob], values: Mapping[str, str]) -> str | None:
    block = probe.module
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}

    def ran() -> Ran:
        with torch.no_grad():
            for name, buffer in block.named_buffers():
                buffer.copy_(buffers[name])
        found = probe.differentiated(probe.leaves, probe.weights)
        found.made += [buffer.clone() for buffer in block.buffers()]
        return found

    plain, turned, before = ran(), Turned(block, knobs, values), _state(block)
    with turned.in_force():
        pass
    if _state(block) != before:
        return "its setter changes more than attributes of the block's modules, which are put back"
    with turned.in_force(), other_forwards({block: turned.forward(block.forward)}):
        error = apart(plain, ran())
    if error > min(probe.close, CLOSE_IN_SINGLE):
        return f"it changes results ({error:.1e} of the largest)"
    return None


def _state(block: nn.Module) -> list[Any]:
    """Its modules and what they have in their attributes."""
    return [(name, id(module), settings_of(module)) for name, module in block.named_modules()]


def apart(one: Ran, other: Ran) -> float:
    """The largest difference of two runs, of the largest number in each tensor."""
    if len(one.made) != len(other.made):
        return math.inf
    largest = max((float(g.abs().max()) for g in one.grads if g is not None and g.numel()), default=0.0)
    floor = ROUNDING * largest  # of a gradient that is nought, nothing but rounding is left
    made = [_error(a, b) for a, b in zip(one.made, other.made, strict=True)]
    grads = [_error(a, b, floor) for a, b in zip(one.grads, other.grads, strict=True)]
    return max([*made, *grads], default=0.0)


def _error(one: Tensor | None, other: Tensor | None, floor: float = 0.0) -> float:
    if one is None or other is None:
        return 0.0 if one is None and other is None else math.inf
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if not one.numel() or one.equal(other):
        return 0.0
    error = float((one.double() - other.double()).abs().max()) / (
        float(one.double().abs().max()) + floor or 1.0
    )
    return error if math.isfinite(error) else math.inf


def values_in_words(values: Mapping[str, str]) -> str:
    """As `chunk_size=4, fused=True`."""
    return ", ".join(f"{name}={text}" for name, text in values.items())


def combinations(knobs: Sequence[Knob]) -> list[dict[str, str]]:
    """All values of all knobs, but for those that they have anyway, as text by name."""
    choices = [{repr(value): None for value in knob.values} for knob in knobs]
    found = []
    for texts in product(
        *([None, *(t for t in c if t != k.default)] for k, c in zip(knobs, choices, strict=True))
    ):
        chosen = {k.name: text for k, text in zip(knobs, texts, strict=True) if text is not None}
        if chosen:
            found.append(chosen)
    return found
