"""A block's call as a step: what it is given, where each tensor of it comes from, and what it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from evoplan.model.foreign.attributes import Settings
from evoplan.model.foreign.children import Child
from evoplan.model.foreign.knobs import Knob
from evoplan.model.foreign.leaves import ChangedCallError, Layout, Numbers, Value, numbers_of, same_values
from evoplan.model.running.random_state import OtherState


@dataclass(frozen=True)
class FromState:
    """A leaf of the arguments that an earlier step has made, by its name in the state.

    Attributes:
        twin: position of an earlier argument that is the very same object: a block may ask.
    """

    name: str
    layout: Layout
    differentiable: bool
    twin: int | None = None


@dataclass(frozen=True)
class Constant:
    """A leaf of the arguments that comes from elsewhere; it may want a gradient all the same."""

    layout: Layout
    differentiable: bool
    twin: int | None = None


@dataclass(frozen=True)
class Made:
    """A leaf of the results that the step makes.

    Attributes:
        within: position of the argument in whose memory it lies, if it does in one's.
        own: name of the block's parameter or buffer in whose memory it lies, likewise.
        storage_bytes: of the memory that it keeps, which may be more than it shows.
        offset: where in that it begins.
        beside: place of the first of what the step makes that lies in the same memory, if another does.
        sharing: how many lie there.
    """

    layout: Layout
    differentiable: bool
    within: int | None = None
    own: str | None = None
    storage_bytes: int = 0
    offset: int = 0
    beside: int | None = None
    sharing: int = 1

    @property
    def state_bytes(self) -> int:
        """What it adds to the state, of shared memory its part."""
        if self.within is not None:
            return self.layout.nbytes
        return 0 if self.own else -(-self.storage_bytes // self.sharing)


@dataclass(frozen=True)
class Passed:
    """A leaf of the results that is a leaf of the arguments, by position."""

    position: int


@dataclass(frozen=True)
class Same:
    """A leaf of the results that is another one of them, by its place among those that are made."""

    number: int


Argument = FromState | Constant | Value
Result = Made | Passed | Same | Value


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a block, at its place in the forward of its model.

    Attributes:
        index: position in the chain.
        path: of the block's module in the model.
        name: the path; with a number for the second call on.
        structure, arguments: of what it is called with, positional and by name, flattened.
        returned, results: of what it returns.
        makes: names of what it makes in the state, for each `Made` among the results.
        changes: names of the buffers that it writes into.
        plain: names of tensors that it reads in its modules' attributes and that are no buffers.
        draws: whether it draws random numbers.
        others: where Python's and NumPy's generators stood, if it draws from one of them.
        work: equal for calls that run the same operators on the same shapes.
        children: the modules that it calls in turn, by path in the block; `.` is the block itself.
        settings: of its modules when these were looked into.
        knobs: of the block's own, by name.
        turned: values of these, as text, under which it was shown to give equal results.
    """

    index: int
    path: str
    name: str
    structure: pytree.TreeSpec
    arguments: tuple[Argument, ...]
    returned: pytree.TreeSpec
    results: tuple[Result, ...]
    makes: tuple[str, ...]
    changes: tuple[str, ...]
    draws: bool
    work: str
    plain: tuple[str, ...] = ()
    others: OtherState | None = None
    children: Mapping[str, Child] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    turned: tuple[Mapping[str, str], ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The state tensors that it reads."""
        return tuple(dict.fromkeys(a.name for a in self.arguments if isinstance(a, FromState)))

    @property
    def made(self) -> tuple[Made, ...]:
        """What it makes."""
        return tuple(result for result in self.results if isinstance(result, Made))

    @property
    def closed(self) -> tuple[int, ...]:
        """Places of what it makes that no gradient goes through, as far as can be told before it runs: where
        none goes through any, all of it may have been frozen.
        """
        some = any(made.differentiable for made in self.made)
        return tuple(
            at
            for at, made in enumerate(self.made)
            if not made.differentiable and (some or not made.layout.continuous)
        )

    @property
    def wanted(self) -> tuple[int, ...]:
        """Positions of the arguments that a gradient is wanted of."""
        return tuple(
            at
            for at, argument in enumerate(self.arguments)
            if not isinstance(argument, Value) and argument.differentiable and argument.twin is None
        )

    def imagined(self, where: str) -> list[Any]:
        """The leaves of its arguments, tensors without data."""
        leaves: list[Any] = []
        for argument in self.arguments:
            if isinstance(argument, Value):
                leaves.append(argument.value)
            else:
                twin = argument.twin
                leaves.append(argument.layout.empty(where) if twin is None else leaves[twin])
        return leaves

    def check(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], latest: Mapping[str, Numbers]
    ) -> list[Any]:
        """The leaves of arguments that are as they were when the call was captured.

        Args:
            latest: of each state tensor, the numbers of what was made last.

        Raises:
            ChangedCallError: they are not; says what differs.
        """
        leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if structure != self.structure:
            raise ChangedCallError(f"{self.name} is called with other arguments than when it was planned")
        for leaf, argument in zip(leaves, self.arguments, strict=True):
            if isinstance(argument, Value):
                if isinstance(leaf, Tensor) or not same_values(leaf, argument.value):
                    raise ChangedCallError(
                        f"{self.name} is given {leaf!r:.60} in place of {argument.value!r:.60}"
                    )
                continue
            if not isinstance(leaf, Tensor):
                raise ChangedCallError(f"{self.name} is given {leaf!r:.60} in place of a tensor")
            there, here = argument.layout, Layout.of(leaf)
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                raise ChangedCallError(f"{self.name} is given {here}, and was planned for {there}")
            if isinstance(argument, FromState) and numbers_of(leaf) != latest.get(argument.name):
                raise ChangedCallError(
                    f"{self.name} is given another tensor than an earlier block has returned: something "
                    "between them has changed since it was planned"
                )
        return leaves

    def arguments_from(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments from their leaves."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.structure)
        return args, kwargs

    def made_of(self, returned: Any) -> tuple[tuple[Tensor, ...], list[Any]]:
        """Of what the block has returned: what it made, and all leaves.

        Raises:
            ChangedCallError: it returns something else than when it was captured.
        """
        leaves, structure = pytree.tree_flatten(returned)
        if structure != self.returned:
            raise ChangedCallError(f"{self.name} returns something else than when it was planned")
        made: list[Tensor] = []
        for leaf, result in zip(leaves, self.results, strict=True):
            if isinstance(result, Made):
                planned = isinstance(leaf, Tensor) and tuple(leaf.shape) == result.layout.shape
                made.append(leaf)
            else:
                planned = isinstance(leaf, Tensor) != isinstance(result, Value)
            if not planned:
                raise ChangedCallError(f"{self.name} returns something else than when it was planned")
        return tuple(made), leaves

    def check_passed(self, leaves: Sequence[Any], made: Sequence[Tensor], given: Sequence[Any]) -> None:
        """That leaves of results are arguments, or other results, where they were when it was captured.

        Raises:
            ChangedCallError: one is not.
        """
        for leaf, result in zip(leaves, self.results, strict=True):
            if isinstance(result, Passed | Same):
                other = given[result.position] if isinstance(result, Passed) else made[result.number]
                if numbers_of(leaf) != numbers_of(other):
                    drawn = (
                        ", as Python's or NumPy's generator has it: draw from torch's, or return a new one"
                    )
                    raise ChangedCallError(
                        f"{self.name} returns another tensor in place of one that it passed on when planned"
                        f"{drawn if self.others else ''}"
                    )

    def result_of(self, made: Sequence[Tensor], leaves: Sequence[Any], given: Sequence[Any]) -> Any:
        """What the block returns: what was made, arguments that are passed on, and the rest of the leaves."""
        tensors = iter(made)
        whole = [
            next(tensors) if isinstance(result, Made)
            else made[result.number] if isinstance(result, Same)
            else given[result.position] if isinstance(result, Passed)
            else leaf
            for result, leaf in zip(self.results, leaves, strict=True)
        ]  # fmt: skip
        return pytree.tree_unflatten(whole, self.returned)
