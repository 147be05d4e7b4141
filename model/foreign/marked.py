"""What follows some of a module's arguments, whatever they are: also where code goes by their values.

Not-a-number passes through what is computed of floating numbers, and marks them itself. Whole numbers have
none, and a test of them (`ids == 102`) may come out one way for all that anybody tries. So those that would
be others, if the arguments were, are marked beside them: operators on single elements, on rows, and look-ups
pass marks on where they belong, any other operator to all that it makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evoplan.model.running.internals import storage_key

NAN = float("nan")


class LookedError(Exception):
    """Python was told a number that is marked, or a shape that follows from one."""


class Marked(TorchDispatchMode):
    """Passes marks on.

    Args:
        whole: whether floating numbers that follow marked whole ones are marked. Else those are only seen not
            to be looked at: what a router chooses for a token from its numbers is that token's.
    """

    def __init__(self, whole: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole, self.checks = whole, _Checks()
        self._marks: dict[int, Tensor] = {}  # by storage, for each of its elements
        self._held: list[Tensor] = []  # or another may get a storage's place

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, all that runs."""
        with self.checks, self:
            yield

    def of(self, tensor: Tensor) -> Tensor:
        """Which of its elements are marked."""
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.isnan()
        marks = self._marks.get(storage_key(tensor))
        if marks is None:
            return torch.zeros(tensor.shape, dtype=torch.bool)
        if marks.numel() != _elements(tensor):  # shown as another dtype
            return marks.any().expand(tensor.shape)
        return marks.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def mark(self, tensor: Tensor, where: Tensor) -> None:
        """Mark more of its elements."""
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.masked_fill_(where, NAN)
            return
        key = storage_key(tensor)
        if key not in self._marks:
            self._held.append(tensor)
            self._marks[key] = torch.zeros(_elements(tensor), dtype=torch.bool)
        marks = self._marks[key]
        if marks.numel() != _elements(tensor):
            marks.fill_(True)
        else:
            marks.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).logical_or_(where)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marks = {id(tensor): self.of(tensor) for tensor in given}
        marked = [tensor for tensor in given if bool(marks[id(tensor)].any())]
        if marked and self._is_told(func, given, marked):
            raise LookedError(f"{func} of a number that may be another")
        before = {storage_key(tensor) for tensor in given}
        if marked:
            marks = {at: found.clone() for at, found in marks.items()}  # it may write into what they lie in
        out = func(*args, **kwargs)
        if marked and _name(func) == "_to_copy" and not (out.is_floating_point() or out.is_complex()):
            out = func(args[0].nan_to_num(0.0), **kwargs)  # not-a-number is not one that is looked up
        if marked:
            self._pass_on(func, args, kwargs, out, marks, marked, before)
        return out

    def _is_told(self, func: Any, given: Sequence[Tensor], marked: Sequence[Tensor]) -> bool:
        if torch.Tag.data_dependent_output in func.tags:
            return not self.checks.running
        if not self.whole or torch.Tag.dynamic_output_shape not in func.tags:
            return False
        # Of what is looked up by whole numbers, how much it is does not depend on them.
        chosen = [tensor for tensor in marked if tensor.dtype in (torch.bool, torch.uint8)]
        return _name(func) != "index" or any(tensor is not given[0] for tensor in chosen)

    def _pass_on(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        marks: dict[int, Tensor],
        marked: Sequence[Tensor],
        before: set[int],
    ) -> None:
        floats = [tensor for tensor in marked if tensor.is_floating_point() or tensor.is_complex()]
        mutable = func._schema.is_mutable
        for made in (leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)):
            if not mutable and storage_key(made) in before:
                continue  # a view, whose marks are there
            of = marked
            if made.is_floating_point() or made.is_complex():
                of = marked if self.whole else floats
                # Not-a-number has gone its way, but where a mask has hidden it.
                if len(of) == len(floats) and torch.Tag.pointwise not in func.tags:
                    continue
            self.mark(made, _where(func, args, kwargs, made, marks, of))


class _Checks(TorchFunctionMode):
    """Whether torch looks at numbers only to see that they are not too large."""

    running = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        classes = kwargs.get("num_classes", args[1] if func is F.one_hot and len(args) > 1 else -1)
        before, self.running = self.running, self.running or (func is F.one_hot and classes > 0)
        try:
            return func(*args, **kwargs)
        finally:
            self.running = before


_ELEMENTS = {"_to_copy", "copy", "clone", "fill", "one_hot", "contiguous"}
_ROWS = {
    "sum", "prod", "mean", "any", "all", "cumsum", "cumprod", "cummax", "cummin", "argmax", "argmin", "max",
    "min", "amax", "amin", "sort", "argsort", "topk", "flip", "count_nonzero", "median", "kthvalue",
}  # fmt: skip
_MOVES = {"cat", "stack", "repeat", "tril", "triu", "index_select", "roll"}


def _where(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    made: Tensor,
    marks: dict[int, Tensor],
    marked: Sequence[Tensor],
) -> Tensor:
    """Which elements of what an operator has made are marked; where that is not known, all."""
    everywhere, name = torch.ones(made.shape, dtype=torch.bool), _name(func)
    try:
        if torch.Tag.pointwise in func.tags or name in _ELEMENTS:
            found = torch.zeros(made.shape, dtype=torch.bool)
            for tensor in marked:
                found = found | marks[id(tensor)]
        elif name in _ROWS:
            found = _along_rows(func, args, kwargs, marks[id(args[0])], made)
        elif name in _MOVES:
            found = func(*pytree.tree_map_only(Tensor, lambda t: marks.get(id(t), t), args), **kwargs)
        elif name == "embedding":
            found = marks[id(args[1])][..., None] | marks[id(args[0])].any()
        elif name == "index":
            found = _looked_up(args[0], args[1], marks, made)
        elif name == "gather":
            found = marks[id(args[0])].gather(args[1], args[2]) | marks[id(args[2])]
        elif name == "scatter":
            rows = [marks[id(t)].any(args[1], True) for t in (args[0], *args[2:]) if isinstance(t, Tensor)]
            found = sum(rows[1:], start=rows[0]).bool()
        else:
            return everywhere
        return found.expand(made.shape)
    except (RuntimeError, IndexError, KeyError, TypeError):  # shapes that no rule here is for
        return everywhere


def _along_rows(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], marks: Tensor, made: Tensor
) -> Tensor:
    names = [argument.name for argument in func._schema.arguments]
    known = dict(zip(names, args, strict=False)) | kwargs
    dims = known.get("dim", known.get("dims"))
    if dims is None and "dim" in names:
        dims = next(a.default_value for a in func._schema.arguments if a.name == "dim")
    if dims is None or dims == []:
        return marks.any().expand(made.shape)
    for dim in sorted((d % marks.ndim for d in ([dims] if isinstance(dims, int) else dims)), reverse=True):
        marks = marks.any(dim, made.ndim == args[0].ndim)
    return marks


def _looked_up(of: Tensor, at: Sequence[Tensor | None], marks: dict[int, Tensor], made: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.index.Tensor(marks[id(of)], at)
    places = [tensor for tensor in at if tensor is not None]
    if not any(bool(marks[id(tensor)].any()) for tensor in places):
        return found
    if any(tensor is None for tensor in at[: len(places)]):
        raise IndexError("not of the first dimensions")
    where = torch.zeros((), dtype=torch.bool)
    for tensor in places:
        where = where | marks[id(tensor)]
    looked_up: Tensor = found | where.reshape(*where.shape, *[1] * (made.ndim - where.ndim))
    return looked_up


def _name(func: Any) -> str:
    name: str = func._schema.name
    return name.removeprefix("aten::").removesuffix("_")


def _elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.itemsize
