"""Random numbers of a module that runs in slices: those that it would have drawn as a whole.

A generator's numbers come in an order that slices do not keep. So with the first slice all that the module
draws is drawn as it would have been, and every slice is given its part. Of dropout a byte for each element is
kept for as long as slices run: with the same dtype it would be four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evoplan.model.foreign.leaves import Layout
from evoplan.model.foreign.watching import draws_numbers

_aten = torch.ops.aten
_BERNOULLI = _aten.bernoulli_.float
_DROPOUT = _aten.native_dropout.default
_FILLS = {_BERNOULLI, _aten.uniform_.default, _aten.normal_.default}
_LIKE = {_aten.rand_like.default, _aten.randn_like.default}
_SIZED = {_aten.rand.default, _aten.randn.default}


@dataclass(frozen=True)
class Draw:
    """What a module draws at once.

    Attributes:
        operator: its name.
        layout: of what is drawn.
    """

    operator: str
    layout: Layout


class OtherDrawsError(RuntimeError):
    """A module draws otherwise in slices than as a whole."""


def draw_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Draw | None:
    """Of an operator that draws; None where slices of it could not be told."""
    if kwargs.get("generator") is not None or func not in _FILLS | _LIKE | _SIZED | {_DROPOUT}:
        return None
    of = args[0] if func is _DROPOUT else out
    return Draw(str(func), Layout.of(of))


class WholeDraws(TorchDispatchMode):
    """Inside `with`, what is drawn by modules that run as a whole; None for what slices could not be told."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Draw | None] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if draws_numbers(func, args, kwargs or {}):
            self.found.append(draw_of(func, args, kwargs or {}, out))
        return out


class SlicedDraws(TorchDispatchMode):
    """Of one run of a module, slice after slice.

    Args:
        draws: what it draws as a whole, in turn.
        length: of the axis.
    """

    def __init__(self, draws: Sequence[Draw | None], length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws, self.length = draws, length
        self._noise: list[Tensor] = []
        self._turn, self._span = 0, slice(0, length)

    @contextmanager
    def of(self, span: slice) -> Iterator[None]:
        """Inside, what is drawn is this slice of the axis."""
        if not self.draws:
            yield
            return
        first, self._turn, self._span = not self._noise, 0, span
        with self:
            yield
        if not first and self._turn != len(self._noise):
            raise OtherDrawsError("a slice draws fewer random numbers than another; fit the model again")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not draws_numbers(func, args, kwargs):
            return func(*args, **kwargs)
        turn, self._turn = self._turn, self._turn + 1
        draw = self.draws[turn] if turn < len(self.draws) else None
        if draw is None or draw.operator != str(func):
            raise OtherDrawsError("slices draw other random numbers than the whole; fit the model again")
        if turn == len(self._noise):
            self._noise.append(_drawn(func, draw.layout, args, kwargs))
        return self._given(func, args, kwargs, self._noise[turn])

    def _given(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], noise: Tensor) -> Any:
        if func in _FILLS:
            return args[0].copy_(self._part(noise, args[0].shape))
        if func is _DROPOUT:
            kept = self._part(noise, args[0].shape)
            return args[0] * kept * (1 / (1 - args[1]) if args[1] < 1 else 0.0), kept.clone()
        return self._part(noise, args[0].shape if func in _LIKE else args[0]).clone()

    def _part(self, noise: Tensor, shape: Sequence[int]) -> Tensor:
        """The part of it that has a shape: all of it, or a slice along the one dimension that differs."""
        if len(noise.shape) == len(shape):
            differ = [dim for dim in range(noise.ndim) if noise.shape[dim] != shape[dim]]
            if not differ:
                return noise
            size, taken = noise.shape[differ[0]], shape[differ[0]]
            length = self._span.stop - self._span.start
            if len(differ) == 1 and size * length == taken * self.length and size % self.length == 0:
                return noise.narrow(differ[0], self._span.start * (size // self.length), taken)
        raise OtherDrawsError(f"{list(shape)} of random numbers are no slice of {list(noise.shape)}")


def _drawn(func: Any, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What an operator would draw of a layout; the rest of what it is called with stays."""
    first = args[0]
    if func in _SIZED:
        return func(layout.shape, *args[1:], **kwargs)  # type: ignore[no-any-return]
    # On the CPU a boolean takes as many of the generator's numbers as one of any other dtype.
    as_bytes = func is _BERNOULLI and first.device.type != "cuda"
    whole = replace(layout, dtype=torch.bool if as_bytes else first.dtype).empty(first.device)
    drawn = func(whole, *args[1:], **kwargs)
    return drawn[1] if func is _DROPOUT else drawn  # type: ignore[no-any-return]
