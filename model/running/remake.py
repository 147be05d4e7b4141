"""Keeping less of a run: what is cheap to make again is made again in backward.

Autograd saves every operand of every product. Of a gated attention that is seven tensors of the size of
its input, of which two are a normalisation and a product with a gate: a few passes over memory to make,
against matrix products for the others. The maths marks such results with `cheap`; a run under `Remaking`
keeps their recipe and what it reads instead of them.

Source: the policy that saves matrix products alone, as JAX has it (checkpoint_policies.dots_saveable);
Korthikanti et al. (2022), Reducing Activation Recomputation in Large Transformer Models.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor

from evoplan.model.running.internals import storage_key
from evoplan.model.running.unchanged import ChangedError, changed, mark

Named = Callable[[], Mapping[str, Tensor]]

_current: ContextVar[Remaking | None] = ContextVar("remaking", default=None)


def cheap(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), whose result costs less to make again than to keep.

    Args:
        function: gives the same result every time, in a tensor of its own, and makes no other tensor that
            autograd saves; mark its parts one by one where it would.
    """
    remaking = None if torch.compiler.is_compiling() else _current.get()
    return function(*inputs) if remaking is None else remaking.run(function, inputs)


class Keeping:
    """While installed, what autograd keeps is held here, so that it is known which tensors these are.

    Args:
        owner: whose run this is, in messages.
        named: tells what the run was given, by name; what it has lives as long as anything that is kept.
    """

    def __init__(self, owner: str = "a submodule", named: Named = dict) -> None:
        self.owner, self.named = owner, named
        self._all: list[weakref.ref[_Held]] = []
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    def __enter__(self) -> Keeping:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Held.take)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(*error)
        self._hooks = None  # it has this object: a circle would outlive what is kept

    def tensors(self) -> list[Tensor]:
        """Those that are kept as they are."""
        return [held.tensor for held in self._living() if held.tensor is not None]

    def drop(self) -> None:
        """Keep nothing any longer: no backward comes by."""
        self.named = dict
        for held in self._living():
            held.drop()
        self._all.clear()

    def changed(self, tensor: Tensor) -> ChangedError:
        """The error that says that one of them was written in place."""
        key = storage_key(tensor)
        names = (name for name, given in self.named().items() if storage_key(given) == key)
        return changed(next(names, "a tensor"), self.owner)

    def _living(self) -> list[_Held]:
        return [held for known in self._all if (held := known()) is not None]

    def _hold(self, tensor: Tensor) -> _Held:
        held = _Held(tensor.detach(), self)
        self._all.append(weakref.ref(held))
        return held

    def _pack(self, tensor: Tensor) -> _Held:
        return self._hold(tensor)


class Remaking(Keeping):
    """While installed, autograd keeps recipes of cheap results in place of them.

    Args:
        context: what forward runs under; recipes are followed under the same.
        owner, named: as `Keeping` has them.
    """

    def __init__(
        self,
        context: AbstractContextManager[object],
        owner: str = "a submodule",
        named: Named = dict,
    ) -> None:
        super().__init__(owner, named)
        self._context = context
        self._recipes: dict[int, _Recipe] = {}  # by storage, while that lives
        self._known = weakref.WeakSet[_Recipe]()
        self._watched: list[weakref.ref[torch.UntypedStorage]] = []
        self._packed: list[_Held] = []
        self._token: Token[Remaking | None] | None = None

    def __enter__(self) -> Remaking:
        self._token = _current.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._token is not None
        _current.reset(self._token)
        self._recipes.clear()
        self._watched.clear()
        self._packed.clear()

    def run(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """A cheap function."""
        recipe = _Recipe(function, [self._hold(tensor) for tensor in inputs], self._context)
        self._packed.clear()
        output = function(*inputs)
        storage = output.untyped_storage()
        for held in self._packed:  # the function's own backward may want its result: sigmoid's does
            if held.tensor is not None and held.tensor.untyped_storage() is storage:
                held.remake(recipe)
        self._packed.clear()
        self._remember(output, recipe)
        return output

    def ran(self, output: Tensor, function: Callable[..., Tensor], inputs: Iterable[Tensor]) -> None:
        """A cheap function has run below autograd, which saves its result, if it does, later."""
        recipe = _Recipe(function, [self._hold(tensor) for tensor in inputs], self._context)
        self._remember(output, recipe)

    def writes(self, storage: int) -> None:
        """A storage is about to be written into: what would be made of it later is made now."""
        self._recipes.pop(storage, None)
        for recipe in self._known:
            if recipe.users and recipe.reads(storage):
                recipe.settle()
        for key, recipe in list(self._recipes.items()):
            if recipe.reads(storage):
                del self._recipes[key]

    def _remember(self, output: Tensor, recipe: _Recipe) -> None:
        storage = output.untyped_storage()
        key, recipe.dtype = storage._cdata, output.dtype
        self._recipes[key] = recipe
        self._known.add(recipe)
        # Another storage may get the same address once this one is gone.
        self._watched.append(weakref.ref(storage, lambda _: self._recipes.pop(key, None)))

    def _hold(self, tensor: Tensor) -> _Held:
        held = super()._hold(tensor)
        recipe = self._recipes.get(tensor.untyped_storage()._cdata)
        # Views as a conjugate, or in another dtype, are more than their layout.
        as_made = recipe is not None and tensor.dtype == recipe.dtype
        if recipe is not None and as_made and not (tensor.is_conj() or tensor.is_neg()):
            held.remake(recipe)
        return held

    def _pack(self, tensor: Tensor) -> _Held:
        held = self._hold(tensor)
        self._packed.append(held)
        return held


def come_past(owner: str) -> str:
    """What is said where a step is to be differentiated that keeps nothing any longer."""
    return (
        f"{owner} has no record any more: backward was here before, or came past it from a loss of earlier "
        "steps; call forward again, or backward(retain_graph=True) the first time"
    )


class _Held:
    """A tensor that backward wants: itself, or how to make it. A step makes some twenty, so it has slots."""

    __slots__ = ("__weakref__", "keeping", "layout", "recipe", "tensor", "version")

    layout: tuple[Any, Any, Any]  # shape, strides and offset of one that is made again

    def __init__(self, tensor: Tensor, keeping: Keeping) -> None:
        if tensor.is_inference():
            mark(f"a tensor of {keeping.owner}", tensor)
        self.tensor: Tensor | None = tensor
        self.keeping, self.version = keeping, tensor._version
        self.recipe: _Recipe | None = None

    def remake(self, recipe: _Recipe) -> None:
        """Drop the tensor: it lies in the storage that the recipe makes."""
        assert self.tensor is not None
        self.layout = self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        self.tensor, self.recipe = None, recipe
        recipe.users += 1

    def drop(self) -> None:
        """Neither keep it nor know how to make it."""
        self.tensor = self.recipe = None

    def take(self) -> Tensor:
        """The tensor, for the one time that backward reads it.

        Raises:
            ChangedError: it was written in place meanwhile.
            RuntimeError: it was dropped.
        """
        if self.recipe is not None:
            return self.recipe.take().as_strided(*self.layout)
        if self.tensor is None:
            raise RuntimeError(come_past(self.keeping.owner))
        if self.tensor._version != self.version:
            raise self.keeping.changed(self.tensor)
        return self.tensor


class _Recipe:
    """How a tensor is made; what it made is kept until its last user has read it.

    Attributes:
        users: how many read it in one backward.
        dtype: of what it makes.
    """

    dtype: torch.dtype | None = None

    def __init__(
        self, function: Callable[..., Tensor], inputs: list[_Held], context: AbstractContextManager[object]
    ) -> None:
        self.function, self.inputs, self.context, self.users = function, inputs, context, 0
        self._made: Tensor | None = None
        self._read = 0
        self._settled = False

    def reads(self, storage: int) -> bool:
        """Whether it makes its tensor of that storage."""
        return not self._settled and any(
            held.tensor is not None and storage_key(held.tensor) == storage for held in self.inputs
        )

    def settle(self) -> None:
        """Make it now, and keep it: what it is made of goes on to be something else."""
        with torch.no_grad():
            self._made = self.function(*(held.take() for held in self.inputs))
        self.inputs.clear()
        self._settled = True

    def take(self) -> Tensor:
        if self._made is None:
            with torch.no_grad(), self.context:
                self._made = self.function(*(held.take() for held in self.inputs))
        made = self._made
        self._read += 1
        if self._read >= self.users and not self._settled:  # another backward would begin anew
            self._made, self._read = None, 0
        return made
