"""Plans for several shapes of input, and what to do with one that there is no plan for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from evoplan.model.running.chain import Plannable
from evoplan.model.running.internals import storage_key
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.sizes import format_size

Shapes = Mapping[str, tuple[int, ...]]

# For inputs of other shapes: say so; run the schedule of the nearest larger plan on them as they are, its
# pieces as many as their axes allow; pad them to that plan's shapes, masked; or plan for them, once.
OtherShapes = Literal["refuse", "clip", "pad", "plan"]
WAYS = get_args(OtherShapes)


@dataclass(frozen=True)
class Fit:
    """A schedule, and the inputs that it was made for.

    Attributes:
        shapes: of the state; None: any.
        input_bytes: that the plan counts for inputs and what is made of them; None: any.
        slack_bytes: that the budget has above the plan's peak; None: any amount.
    """

    schedule: Sequence
    shapes: Shapes | None = None
    input_bytes: int | None = None
    slack_bytes: int | None = None

    def check_room(self, given: Iterable[Tensor | None], made: Iterable[Tensor]) -> None:
        """See that inputs take no more than the plan counts, or the budget has room for it.

        Args:
            given: by the caller.
            made: the state and the constants; copies where what was given is laid out otherwise.

        Raises:
            ValueError: there is no room; says what to do.
        """
        if self.input_bytes is None or self.slack_bytes is None:
            return
        there = [tensor for tensor in given if tensor is not None]
        sizes = {storage_key(tensor): _taken_bytes(tensor) for tensor in there}
        copies = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in made}
        taken = sum((copies | sizes).values())
        if taken > self.input_bytes + self.slack_bytes:
            counted, left = format_size(self.input_bytes), format_size(self.slack_bytes)
            raise ValueError(
                f"inputs and copies made of them take {format_size(taken)}; the plan counts {counted}, and "
                f"its budget has {left} left. Some are not contiguous, or masks not of the model's dtype: "
                "make them so, or plan with inputs like these"
            )


def _taken_bytes(tensor: Tensor) -> int:
    """Of its elements, of which an expanded tensor has fewer than its shape says."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return min(tensor.numel(), last + 1) * tensor.element_size()


class Fits:
    """Schedules by the shapes that they are for.

    Args:
        fits: at least one.
        other_shapes: what to do where none is for the shapes.
        plan: makes one for a model and shapes, where `other_shapes` is "plan".
    """

    def __init__(
        self,
        fits: Iterable[Fit],
        other_shapes: OtherShapes = "refuse",
        plan: Callable[[Plannable, Shapes], Fit] | None = None,
    ) -> None:
        if other_shapes not in WAYS:
            raise ValueError(f"other_shapes must be one of {', '.join(WAYS)}, not {other_shapes!r}")
        self.all, self.other_shapes, self._plan = list(fits), other_shapes, plan

    def find(self, model: Plannable, shapes: Shapes) -> Fit:
        """The schedule for inputs of these shapes, or with "clip" and "pad" the nearest larger one.

        Raises:
            ValueError: there is none; says what there is and what can be done.
        """
        for fit in self.all:
            if fit.shapes is None or fit.shapes == shapes:
                return fit
        if self.other_shapes == "plan":
            assert self._plan is not None
            self.all.append(self._plan(model, shapes))
            return self.all[-1]
        larger = [fit for fit in self.all if fit.shapes is not None and _within(shapes, fit.shapes)]
        if self.other_shapes == "refuse" or not larger:
            raise ValueError(self._no_fit(shapes))
        return min(larger, key=lambda fit: sum(map(prod, (fit.shapes or {}).values())))

    def _no_fit(self, shapes: Shapes) -> str:
        def tell(shapes: Shapes) -> str:
            return ", ".join(f"{name} of shape {shape}" for name, shape in shapes.items())

        (first, *more), known = self.all, [fit.shapes for fit in self.all if fit.shapes is not None]
        for name, shape in (first.shapes or {}).items() if not more else ():
            if shapes[name] != shape:
                was = f"the plan is for {name} of shape {shape}, not {shapes[name]}"
                break
        else:
            was = f"the plans are for {'; '.join(map(tell, known))}; not for {tell(shapes)}"
        if self.other_shapes == "refuse":
            return (
                f"{was}; give apply_plan several plans, or other_shapes='clip' or 'pad' for smaller inputs, "
                "or 'plan' for any"
            )
        return f"{was}; no plan is as large: give one that is, or other_shapes='plan'"


def _within(shapes: Shapes, larger: Shapes) -> bool:
    return all(
        len(shape) == len(larger[name]) and all(a <= b for a, b in zip(shape, larger[name], strict=True))
        for name, shape in shapes.items()
    )


def padded(model: Plannable, given: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Forward's arguments with zeros behind them up to these shapes of the state, and masks that say so.

    Raises:
        ValueError: the model has no masks.
    """
    masks = model.config.masks
    if set(shapes) - set(masks.values()):
        raise ValueError("this model has no masks to hide padding behind; use other_shapes='clip' or 'plan'")
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = _to(given[name], shape)
    for name, of in masks.items():
        mask = given.get(name)
        mask = torch.ones(given[of].shape[:-1], device=given[of].device) if mask is None else mask
        tensors[name] = _to(mask.to(given[of].dtype), shapes[of][:-1])
    return tensors


def _to(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    after = [size - own for size, own in zip(shape, tensor.shape, strict=True)]
    return pad(tensor, [n for size in reversed(after) for n in (0, size)])


def cropped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The part of a padded tensor that was there before."""
    return tensor[tuple(slice(size) for size in shape)]
