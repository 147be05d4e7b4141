"""What every submodule of a block has in common: three stages and a statement of how it may be cut.

A submodule rewrites one tensor of the state: `new = target + dropout(update)`. Its update is

    context(state)        computed once (a pair bias, the other operand of a triangle product)
    piece(slice, context) a partial update; where the work and the memory are
    finish(update)        what needs the whole sum: output bias, normalisation, gate

Stages see layer-normed tensors, so a normalisation is computed once per slice however many
stages read it. Nothing here knows of schedules; `model.running.execution` runs the stages in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from evoplan.model.config import Dims
from evoplan.model.running.in_place import add_over, multiply_over
from evoplan.model.running.layers import altered_layers
from evoplan.model.running.remake import cheap
from evoplan.model.running.unread import affine_at_the_end

# A stage argument by name: state tensors, masks, and "dropout" where there is one.
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """What submodules call the tensors that they read, and the dimensions of each without its batch.

    Attributes:
        state: what a schedule moves.
        constants: all others.
    """

    state: Mapping[str, Dims]
    constants: Mapping[str, Dims]

    def dims(self, tensor: str) -> Dims:
        """The names of a tensor's dimensions."""
        return self.state[tensor] if tensor in self.state else self.constants[tensor]

    def dim(self, tensor: str, *names: str) -> int:
        """The dimension of one of these names, from the right."""
        dims = self.dims(tensor)
        return next(index for index, name in enumerate(dims, start=-len(dims)) if name in names)

    def cuts(self, tensors: Iterable[str], *names: str) -> dict[str, int]:
        """Of some tensors, those that have a dimension of one of these names, and which it is."""
        return {t: self.dim(t, *names) for t in dict.fromkeys(tensors) if {*names} & {*self.dims(t)}}


@dataclass(frozen=True)
class IndependentAxis:
    """An axis along which a piece needs only its own slice and the context (`chunk`).

    Attributes:
        name: what users call it.
        cuts: dimension (from the right) along which each tensor is sliced; others go in whole.
    """

    name: str
    cuts: Mapping[str, int]


@dataclass(frozen=True)
class ReductionAxis:
    """An axis over hidden channels whose partial updates are combined before `finish` (`coshard`).

    Attributes:
        name: what users call it.
        size: how many indices it has.
        concatenate: partial updates lie side by side in the last dimension instead of adding up.
    """

    name: str
    size: int
    concatenate: bool = False


Axis = IndependentAxis | ReductionAxis
SomeAxis = TypeVar("SomeAxis", IndependentAxis, ReductionAxis)


class Sharding(Protocol):
    """How ranks share a submodule's work, each on its own shard (`model.sharing.parallel`)."""

    def gather(self, context: Tensor) -> Tensor:
        """The whole context from every rank's; differentiable."""

    def reduce(self, grad: Tensor) -> Tensor:
        """The gradient of this rank's context from all ranks' gradients of the whole: gather's transpose."""

    def whole_shape(self, target: Tensor) -> list[int]:
        """The shape of the tensor that `target` is this rank's shard of."""

    def own(self, whole: Tensor) -> Tensor:
        """This rank's shard of a tensor laid out like the target."""


class Submodule(nn.Module):
    """Base class of the submodules. Subclasses declare the class attributes and write the stages."""

    layout: Layout = Layout({}, {})
    target: str
    context_inputs: tuple[str, ...] = ()
    piece_inputs: tuple[str, ...]
    finish_inputs: tuple[str, ...] = ()
    # The dimensions of the context, and those along which it can be computed in slices: its inputs are cut,
    # its result is joined there. Ranks cut it so too: what the pieces read as well must be cut alike.
    context_dims: Dims = ()
    context_axis: Dims = ()
    # True where finish(u) = A u + b, so that its gradient needs no value of u.
    finish_is_affine: bool = True
    # The target's dimension along which one dropout mask is shared; None where there is no dropout.
    dropout_shared: str | None = None
    # True where every position needs only itself, so that ranks may cut the target anywhere.
    positionwise: bool = False

    # True where pieces run attention, for which there are kernels (`model.running.kernels`).
    attends: bool = False

    # True for a step that only brings the state into the layout that the next one wants.
    leads_in: bool = False

    # False where the new target is the update alone, which somebody else's block adds (`model.adapters`).
    residual: bool = True

    # Set on a rank's copy of the submodule: how the work is shared, and what its own masks are called.
    sharding: Sharding | None = None
    names: Mapping[str, str] = {}

    axes: tuple[Axis, ...]  # set by the constructor
    norms: nn.ModuleDict  # the LayerNorm of each state tensor that is read through one
    dropout: float = 0.0

    def forward(self, *state: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """The new target, as `run` makes it of the state tensors that are read.

        Whoever runs a submodule calls it so, however the stages are cut: hooks see its inputs and its output.
        """
        return run(*state)

    # The stages take the tensors of their inputs, in that order; which those are is each submodule's affair.

    def context(self, *inputs: Any, **part: Any) -> Tensor | None:
        """context(*inputs, part: slice = FULL): the context for the hidden channels `part`.

        None where a piece needs only its slice.
        """
        return None

    def piece(self, *inputs: Any, **context_and_part: Any) -> Tensor:
        """piece(*inputs, context: Tensor | None, part: slice = FULL): partial update of a slice.

        From the hidden channels `part`.
        """
        raise NotImplementedError

    @affine_at_the_end
    def finish(self, update: Tensor, *inputs: Any, **_: Any) -> Tensor:
        """finish(update, *inputs): what follows the reduction, if anything; may write into `update`."""
        return update

    @property
    def _inputs(self) -> tuple[str, ...]:
        return (self.target, *self.context_inputs, *self.piece_inputs, *self.finish_inputs)

    @property
    def reads(self) -> tuple[str, ...]:
        """State tensors that the submodule reads, its target first."""
        if self.target not in self.layout.state:
            raise TypeError(
                f"the layout of {type(self).__name__} has no {self.target}; declare what it reads and what "
                "its dimensions are called"
            )
        return tuple(dict.fromkeys(name for name in self._inputs if name in self.layout.state))

    @property
    def constants(self) -> tuple[str, ...]:
        """Masks that the submodule reads."""
        return tuple(dict.fromkeys(name for name in self._inputs if name not in self.layout.state))

    def along(self, *names: str) -> IndependentAxis:
        """The axis of the first name: it cuts what pieces read wherever a dimension has one of the names."""
        read = (self.target, *self.piece_inputs, *self.finish_inputs)
        return IndependentAxis(names[0], self.layout.cuts(read, *names))

    @property
    def rows(self) -> Mapping[str, int]:
        """Every tensor along its first dimension: what follows a reduction needs one position at a time."""
        return {name: -len(self.layout.dims(name)) for name in (*self.reads, *self.constants)}

    @property
    def context_cuts(self) -> Mapping[str, int]:
        """Where the context's inputs are cut for a slice of it."""
        return self.layout.cuts(self.context_inputs, *self.context_axis)

    @property
    def context_dim(self) -> int:
        """The context's dimension, from the right, along which its slices are joined."""
        at = [index for index, name in enumerate(self.context_dims) if name in self.context_axis]
        return at[0] - len(self.context_dims) if at else -1

    @property
    def dropout_shared_dim(self) -> int | None:
        """The target's dimension, from the right, along which one dropout mask is shared."""
        return None if self.dropout_shared is None else self.layout.dim(self.target, self.dropout_shared)

    def axis(self, name: str) -> Axis:
        """The declared axis of that name; ValueError lists the others."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        names = ", ".join(axis.name for axis in self.axes)
        raise ValueError(f"{type(self).__name__} has no axis {name!r}; it has: {names}")

    def axis_of(self, kind: type[SomeAxis], name: str | None) -> SomeAxis:
        """The declared axis that a strategy cuts, which checks have found to be of that kind."""
        assert name is not None
        axis = self.axis(name)
        assert isinstance(axis, kind)
        return axis

    @property
    def shard_cuts(self) -> dict[str, int]:
        """Where ranks cut each tensor that the stages read; empty where any cut will do."""
        if self.positionwise:
            return {}
        (axis,) = (axis for axis in self.axes if isinstance(axis, IndependentAxis))
        return {**self.context_cuts, **axis.cuts}

    def normalised(self, tensors: Tensors, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those tensors by name, layer-normed where they are state."""
        return {
            name: cheap(self.norms[name], tensors[name]) if name in self.norms else tensors[name]
            for name in dict.fromkeys(names)
        }

    def sliced_context(self, tensors: Tensors) -> Tensor:
        """The context of all hidden channels from a slice along `context_cuts`, where there is a context."""
        x = self.normalised(tensors, self.context_inputs)
        context = self.context(*(x[name] for name in self.context_inputs))
        assert context is not None  # as it is made of something
        return context

    def gathered(self, context: Tensor | None) -> Tensor | None:
        """The whole context, from this rank's where the work is shared."""
        return context if context is None or self.sharding is None else self.sharding.gather(context)

    def update(self, tensors: Tensors, context: Tensor | None = None) -> Tensor:
        """The update of the slice that `tensors` hold, dropout applied.

        Args:
            tensors: slices of everything the stages read, cut alike, and the "dropout" mask if any.
            context: the whole context; computed from `tensors` when not given, which must be whole then.
        """
        own_context = bool(self.context_inputs) and context is None
        names = (*self.piece_inputs, *self.finish_inputs, *(self.context_inputs if own_context else ()))
        x = self.normalised(tensors, names)
        if own_context:
            context = self.gathered(self.context(*(x[name] for name in self.context_inputs)))
        update = self.piece(*(x[name] for name in self.piece_inputs), context=context)
        update = self.finish(update, *(x[name] for name in self.finish_inputs))
        return dropped(update, tensors)

    def new_target(self, tensors: Tensors) -> Tensor:
        """The submodule as the paper writes it: target plus update, nothing cut."""
        update = self.update(tensors)
        return add_residual(tensors[self.target], update) if self.residual else update

    def new_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the new target where the target has `shape`."""
        return tuple(shape)

    @property
    def shared_by(self) -> str:
        """How ranks share its work; equal where they do so alike."""
        return repr(self.sharding)

    def signature(self) -> tuple[Any, ...]:
        """Equal for submodules that cost the same on the same input, shared alike."""
        parameters = tuple(
            (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in self.named_parameters()
        )
        altered = tuple((name, type(layer)) for name, layer in altered_layers(self))
        about = type(self).__name__, self.residual, self.dropout_shared_dim, self.dropout > 0, repr(self.axes)
        return *about, parameters, altered


def dropped(update: Tensor, tensors: Tensors) -> Tensor:
    """Dropout, where the tensors hold a mask for it. May write into `update`."""
    mask = tensors.get("dropout")
    return update if mask is None else multiply_over(update, mask)


def add_residual(target: Tensor, update: Tensor) -> Tensor:
    """target + update; reuses the memory of `update` where its layout is that of `target`."""
    if update.stride() == target.stride() and update.dtype == target.dtype:
        return add_over(update, target)
    return target + update
