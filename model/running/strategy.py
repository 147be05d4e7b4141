"""How one submodule is run: a kind of run, the axis that it cuts into how many pieces, attention's kernel.

A kind is one file in `model.running.kinds`; nothing else knows which there are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, UntypedStorage

from evoplan.model.running.parameters import Parameters
from evoplan.model.running.remake import Keeping
from evoplan.model.running.submodule import Axis, Submodule, Tensors

_PATTERN = re.compile(r"(\w+)(?:\((\w+), *(\d+)\))?(?:\+([\w-]+(?:\(\w+\))?))?(?:\[(.+)\])?")
REDO = "redo"  # of a module within: it runs again in backward
_INNER = re.compile(
    r"([^=,\[\]]+)=(redo|set\([^=,()\[\]]+\)|"
    r"(?:whole|lean|chunk\(\w+, \d+\))(?:\+[\w-]+(?:\(\w+\))?)?)(?:, |$)"
)

Within = tuple[tuple[str, str], ...]

EAGER = "eager"  # attention as the formula is written
COMPILED = "compiled"  # the same, the whole submodule through torch.compile

# Piece counts offered, where what is cut is that long.
PIECES = (2, 4, 8, 16, 32, 64)


class Record(Protocol):
    """What a run has kept for its backward (`model.running.runs`)."""

    def vjp(self, grad: Tensor, keep: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the state and of the parameters by name, from that of the new target."""

    def storages(self) -> list[UntypedStorage]:
        """What it alone keeps, where it was asked to know: neither state nor masks nor parameters."""


class Kind:
    """One way to run a submodule forward, for a backward or for none.

    Attributes:
        name: by which strategies print.
        axis: the sort of axis that it cuts; None: it cuts nothing, and keeps what backward needs.
        pays_in_inference: False where it differs from `whole` in backward alone.
        takes_kernels: whether attention may run with another kernel under it.
    """

    name: str
    axis: type[Axis] | None = None
    pays_in_inference = True
    takes_kernels = True

    def offered(self, submodule: Submodule, shape: Sequence[int]) -> Iterator[Strategy]:
        """Its strategies for a submodule whose target has a shape."""
        for axis in submodule.axes:
            if isinstance(axis, self.axis or ()):
                for n in self.counts(self.length(submodule, axis, shape)):
                    yield Strategy(self.name, axis.name, n)

    def counts(self, length: int) -> list[int]:
        """The numbers of pieces worth a try where that much is cut."""
        return [n for n in PIECES if n <= length]

    def length(self, submodule: Submodule, axis: Axis, shape: Sequence[int]) -> int:
        """How much there is to cut, of a target with a shape."""
        raise NotImplementedError

    def check(self, submodule: Submodule, strategy: Strategy, shape: Sequence[int]) -> None:
        """ValueError where the submodule, its target of that shape, cannot run so; says why."""
        if strategy.within:
            raise ValueError("modules within are for blocks of models that were written elsewhere")
        if strategy.axis is None:
            return
        axis = submodule.axis(strategy.axis)
        if not isinstance(axis, self.axis or ()):
            right = next(kind.name for kind in KINDS.values() if kind.axis and isinstance(axis, kind.axis))
            raise ValueError(f"{strategy.axis} is cut by {right}, not {self.name}")
        length = self.length(submodule, axis, shape)
        if strategy.n > length:
            raise ValueError(f"cannot cut {length} into {strategy.n} pieces")

    def possible(self, submodule: Submodule, strategy: Strategy) -> Strategy:
        """The strategy, or what has to stand in for it with the layers that the submodule has now."""
        return strategy

    def discarded(self, submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool) -> Tensor:
        """The new target, keeping nothing; called without autograd."""
        raise NotImplementedError

    def recorded(
        self,
        submodule: Submodule,
        strategy: Strategy,
        tensors: Tensors,
        wanted: Collection[str] | None,
        owner: str,
        parameters: Parameters | None,
        movable: bool = False,
        unread: bool = False,
    ) -> tuple[Record, Tensor | None]:
        """The record that backward is computed from, and the new target.

        Args:
            movable: the record knows its storages.
            unread: nobody reads the new target: only what backward needs runs, and there may be none.
        """
        raise NotImplementedError

    def written(
        self, submodule: Submodule, strategy: Strategy, tensors: Tensors, owner: str
    ) -> tuple[Keeping | None, Tensor]:
        """What autograd's own graph keeps of a run, where it can be let go of, and the new target.

        Of kinds that cut nothing.
        """
        raise NotImplementedError


KINDS: dict[str, Kind] = {}  # by name


def register(*kinds: Kind) -> None:
    """Make kinds known, in the order in which they are offered."""
    KINDS.update({kind.name: kind for kind in kinds})


@dataclass(frozen=True)
class Strategy:
    """A kind of run, such as `whole` or `chunk(axis, n)`, and the kernel that attention runs with.

    Attributes:
        kind: by name.
        axis: name of the axis that is cut; None where nothing is.
        n: number of pieces.
        kernel: of `model.running.kernels`; printed after a plus unless it is eager.
        within: of a block that somebody else wrote: modules of it, by path, that are run otherwise (see
            `model.foreign.inside`): `redo`, `chunk(dim, n)`, or, where one was shown to be a submodule of
            ours, a strategy of that; the block itself is `.`. Its own knobs are
            named after it, such as `.chunk_size`, and are `set(16)`.
    """

    kind: str = "whole"
    axis: str | None = None
    n: int = 1
    kernel: str = EAGER
    within: Within = ()

    def __post_init__(self) -> None:
        kind = KINDS.get(self.kind)
        if kind is None or (kind.axis is None) != (self.axis is None):
            raise ValueError(f"no such strategy: {self.kind} along {self.axis}")
        if self.in_pieces and self.n < 1:
            raise ValueError(f"a {self.kind} needs at least one piece, not {self.n}")

    @property
    def way(self) -> Kind:
        """Its kind itself."""
        return KINDS[self.kind]

    @property
    def in_pieces(self) -> bool:
        """Whether it keeps nothing but the submodule's input, from which backward recomputes each piece."""
        return self.axis is not None

    @property
    def modules(self) -> Within:
        """Of `within` the modules: those run again in backward."""
        return tuple((path, way) for path, way in self.within if not is_knob(path))

    @property
    def knobs(self) -> Within:
        """Of `within` the knobs, by name, and the values that they are set to, as text."""
        found = [(path, way) for path, way in self.within if is_knob(path)]
        return tuple((path[1:], way[len("set(") : -1]) for path, way in found)

    def __str__(self) -> str:
        how = f"{self.kind}({self.axis}, {self.n})" if self.in_pieces else self.kind
        inner = ", ".join(f"{path}={inner}" for path, inner in self.within)
        return how + ("" if self.kernel == EAGER else f"+{self.kernel}") + (f"[{inner}]" if inner else "")

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """The strategy that prints as `text`; ValueError says what is expected."""
        match = _PATTERN.fullmatch(text)
        kind = KINDS.get(match[1]) if match else None
        if match is None or kind is None or (kind.axis is None) != (match[2] is None):
            *others, last = (f"{name}(axis, n)" if kind.axis else name for name, kind in KINDS.items())
            raise ValueError(
                f"{text!r} is no strategy; expected {', '.join(others)} or {last}, "
                "and +kernel where it is not eager"
            )
        return cls(match[1], match[2], int(match[3] or 1), match[4] or EAGER, _within(match[5] or ""))


def is_knob(path: str) -> bool:
    """Whether that is no module's path but a knob's, `.name`."""
    return path.startswith(".") and path != "."


def _within(text: str) -> Within:
    found, at = [], 0
    while at < len(text):
        match = _INNER.match(text, at)
        if match is None or is_knob(match[1]) != match[2].startswith("set("):
            raise ValueError(
                f"{text[at:]!r} is no way to run a module; expected path=redo, path=chunk(dim, n) or "
                "path=lean+kernel, or "
                ".knob=set(value)"
            )
        found.append((match[1], match[2]))
        at = match.end()
    return tuple(found)
