"""What every family of models declares, and the sizes of inputs. Free of torch, for the command line.

Legend, used throughout: s = n_seq (rows of the alignment), r = n_res (residues or tokens),
c_m = channels of the MSA representation m [*, s, r, c_m],
c_z = channels of the pair representation z [*, r, r, c_z],
c_s = channels of the single representation s [*, r, c_s].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Fields = TypeVar("_Fields", bound="DataclassInstance")

# Names of a tensor's dimensions, from the left. The first of a state tensor's is the batch, the last, its
# channels, is called as the configuration calls their number.
Dims = tuple[str, ...]

# What of an input's shape each dimension is as long as.
LENGTHS = {
    "batch": "batch",
    "seq": "n_seq",
    "extra": "n_extra",
    "res": "n_res",
    "row": "n_res",
    "column": "n_res",
}


def require_positive(**sizes: int) -> None:
    """ValueError where one of these is no whole number of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


@dataclass(frozen=True)
class InputShape:
    """Shape of one step's input: `batch` alignments of `n_seq` rows and `n_res` columns.

    Attributes:
        n_seq: rows s of the alignment; left out where the model reads none.
        n_res: residues or tokens, r.
        batch: inputs of a step.
        n_extra: rows of the extra alignment; left out where the model has no stack for one.

    Raises:
        ValueError: one of them is no whole number of at least 1.
    """

    n_seq: int | None = None
    n_res: int = 0  # which is refused
    batch: int = 1
    n_extra: int | None = None

    def __post_init__(self) -> None:
        require_positive(**{name: size for name, size in vars(self).items() if size is not None})

    def rows(self) -> int:
        """`n_seq`, for what reads an alignment; ValueError where there is none."""
        if self.n_seq is None:
            raise ValueError("the rows of an alignment are needed, and this shape has none; give n_seq")
        return self.n_seq

    def length(self, dim: str) -> int | None:
        """How long a dimension of that name is; None where it is not given."""
        length: int | None = getattr(self, LENGTHS[dim])
        return length

    def __str__(self) -> str:
        given = {"s": self.n_seq, "r": self.n_res, "extra s": self.n_extra}
        sizes = ", ".join(f"{name}={size}" for name, size in given.items() if size is not None)
        return sizes + (f", batch {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class ModelConfig:
    """Base of the families' configurations: frozen dataclasses of widths, numbers of heads and rates.

    Attributes:
        state: what a schedule moves, by name, each with its dimensions.
        masks: each mask that forward takes, and the state tensor whose positions it marks.
        ranks: whether ranks may share an input.
    """

    state: ClassVar[Mapping[str, Dims]]
    masks: ClassVar[Mapping[str, str]]
    ranks: ClassVar[bool] = True

    if TYPE_CHECKING:  # a field of most families, which a property here would be the default of

        @property
        def n_block(self) -> int:
            """How many blocks there are."""

    def __post_init__(self) -> None:
        for of in fields(self):
            value = getattr(self, of.name)
            if of.name.startswith("dropout"):
                if type(value) not in (int, float) or not 0.0 <= value < 1.0:
                    raise ValueError(f"{of.name} must be at least 0 and below 1, not {value!r}")
            elif isinstance(of.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"{of.name} must be True or False, not {value!r}")
            elif not isinstance(of.default, str):  # a choice, which the family looks at
                require_positive(**{of.name: value})

    @classmethod
    def checked(cls, config: Any) -> Self:
        """It, if it is a configuration of this family; else ValueError."""
        if not isinstance(config, cls):
            raise ValueError(f"config is of class {type(config).__name__}; give {cls.__name__}(...)")
        return config

    def _own(self) -> list[tuple[str, Any]]:
        return [(of.name, getattr(self, of.name)) for of in fields(self)]

    @property
    def widest(self) -> int:
        """Channels of the widest tensor that a step makes of a position."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Channels of the widest tensor of the state."""
        return max(map(self.width, self.state))

    def width(self, tensor: str) -> int:
        """Channels of a tensor of the state."""
        width: int = getattr(self, self.state[tensor][-1])
        return width

    def state_shapes(self, shape: InputShape) -> dict[str, tuple[int, ...]]:
        """Shapes of the state's tensors, the batch first.

        Raises:
            ValueError: the shape lacks a length that the model needs, or has one that it does not.
        """
        lengths = {dim for dims in self.state.values() for dim in dims[:-1]}
        given = {LENGTHS[dim] for dim in lengths}
        for name, what in (("n_seq", "the rows of an alignment"), ("n_extra", "the rows of an extra one")):
            flag = f"--{name.replace('_', '-')}"
            if name in given and getattr(shape, name) is None:
                raise ValueError(f"this model needs {what}; give {flag}")
            if name not in given and getattr(shape, name) is not None:
                raise ValueError(f"{name} is {what}, which this model does not read; leave {flag} out")
        return {
            name: (*(shape.length(dim) or 0 for dim in dims[:-1]), self.width(name))
            for name, dims in self.state.items()
        }

    def input_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> InputShape:
        """The sizes of inputs whose state has these shapes.

        Raises:
            ValueError: they are no shapes of this model's state.
        """
        sizes: dict[str, int] = {}
        for name, dims in self.state.items():
            if len(shapes[name]) != len(dims):
                raise ValueError(
                    f"inputs need a batch dimension: {name} [{', '.join(dims)}], not {shapes[name]}"
                )
            for dim, size in zip(dims[:-1], shapes[name], strict=False):
                sizes.setdefault(LENGTHS[dim], size)
        found = InputShape(**sizes)
        for name, expected in self.state_shapes(found).items():
            if tuple(shapes[name]) != expected:
                raise ValueError(
                    f"{name} is {tuple(shapes[name])}, the model and the other inputs need {expected}"
                )
        return found

    def resized(self, **sizes: int | None) -> Self:
        """The model with other sizes, where they are not None.

        Raises:
            ValueError: it has none of that name.
        """
        given = {name: size for name, size in sizes.items() if size is not None}
        own = [name for name, size in self._own() if type(size) is int]
        for name in given:
            if name not in own:
                raise ValueError(f"this model has no {name}; its sizes are {', '.join(own)}")
        return replace(self, **given)

    def with_blocks(self, n_block: int) -> Self:
        """The model's first blocks."""
        return self.resized(n_block=n_block)

    def with_dropout(self, rate: float) -> Self:
        """The same model with one dropout rate everywhere; 0 turns it off.

        Raises:
            ValueError: it drops nothing, whatever the rate.
        """
        rates = [name for name, _ in self._own() if name.startswith("dropout")]
        if rate and not rates:
            raise ValueError(f"{type(self).__name__} drops nothing; leave --dropout out")
        return replace(self, **dict.fromkeys(rates, rate))

    def without_rates(self) -> Self:
        """The model with one rate wherever it drops: memory asks whether there is a mask, not how dense."""
        rates = {name: 0.5 if rate else 0.0 for name, rate in self._own() if name.startswith("dropout")}
        return replace(self, **rates)

    def elements(self, shape: InputShape) -> int:
        """More than any tensor that a step makes has: attention's weights, or the widest at a position."""
        lengths = [max(sizes[1:-1]) for sizes in self.state_shapes(shape).values()]
        return shape.batch * max(lengths) ** 2 * shape.n_res * self.widest


@dataclass(frozen=True)
class Preset:
    """A named model with the input shape it is usually trained on."""

    config: ModelConfig
    shape: InputShape
    says: str


@dataclass(frozen=True)
class Family:
    """Models of one kind; `model.families` lists them.

    Attributes:
        name: in plan files.
        stack: the `Plannable` that is made as stack(config), as module:class, not loaded before it is needed.
        program: the `model.programs.program.Program` that `run` trains around it, likewise; None: none.
        instead: where there is none, what to use.
    """

    name: str
    config: type[ModelConfig]
    stack: str
    program: str | None = None
    presets: Mapping[str, Preset] = field(default_factory=dict)
    instead: str = ""


def override(base: _Fields, **changes: Any) -> _Fields:
    """Copy of a frozen dataclass with the changes that are not None."""
    return replace(base, **{name: value for name, value in changes.items() if value is not None})
