"""What is planned for: a model, its shapes, a device and a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from evoplan.cost_model.devices import DTYPES, Device, Link, link_of
from evoplan.model.config import InputShape, ModelConfig
from evoplan.model.data.alignment import alignment_shape, warn_skipped
from evoplan.model.families import FAMILIES, family_of
from evoplan.planner.problems.device_file import IN_A_LINE, LinkEntry, device_entry, one_line
from evoplan.planner.sizes import MOST

Mode = Literal["training", "inference"]
MEAN_SQUARE = "mean_square"  # of `model.programs.loss`
Optimizer = Literal["none", "sgd", "adamw"]
Mixed = Literal["bf16-mixed", "fp16-mixed"]
AUTOCAST: dict[Mixed, str] = {"bf16-mixed": "bfloat16", "fp16-mixed": "float16"}
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=IN_A_LINE)]
MOST_BLOCKS = 1024  # for which planning takes minutes
# Samples and rows go one by one through some steps, also where they are only counted.
MOST_BATCH, MOST_LENGTH = 4096, 2**17


def _config_of(value: Any) -> ModelConfig:
    """A model's configuration from what a plan file has of it, which names its family."""
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("family"), str):
        raise ValueError("it names no family")
    family = FAMILIES.get(value["family"])
    if family is None:
        raise ValueError(f"unknown family {value['family'][:40]!r}; there are: {', '.join(FAMILIES)}")
    sizes = {name: size for name, size in value.items() if name != "family"}
    try:
        config: ModelConfig = TypeAdapter(family.config).validate_json(json.dumps(sizes), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise ValueError(f"{where}: " * bool(where) + first["msg"].removeprefix("Value error, ")) from None
    return config


def _config_to_json(config: ModelConfig) -> dict[str, Any]:
    return {"family": family_of(config).name, **asdict(config)}


def _possible_device(value: Device | None) -> Device | None:
    if value is not None:
        with one_line():
            device_entry(value)
    return value


OwnDevice = Annotated[Device | None, AfterValidator(_possible_device)]


class Given(BaseModel):
    """How an input is given where that is not as the model wants it, so that it is copied.

    Attributes:
        name: of forward's argument.
        dtype: by name; None: the problem's.
        stride: in elements; None: without gaps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: str | None = None
    stride: tuple[Annotated[int, Field(ge=0)], ...] | None = None


class Problem(BaseModel):
    """The question a plan answers.

    Attributes:
        model: name of the preset it started from, or "custom".
        dtype: of parameters and inputs, and of all arithmetic unless `mixed` says otherwise.
        mixed: products in half precision, as torch.autocast chooses them.
        budget_bytes: what the device may hold at the peak of a step; None is unlimited.
        reserve_bytes: of the budget, kept free for what is not in the plan.
        host_bytes: of host memory, in which what training keeps may wait for backward; None: nothing waits.
        loss: what the peak holds for: `mean_square` of all outputs, or the name of the user's own.
        given: inputs that are not as the model wants them.
        donate: whether a step takes the state that it is given, to write over and to let go; in inference.
        device: a name of the device table, or cuda for this machine's GPU.
        own_device: the device itself where the table does not have it.
        ranks: devices that share one input (dynamic axial parallelism).
        link: what they talk over; None is the device's own, or a network's beyond a node of 8.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Name
    config: Annotated[ModelConfig, PlainValidator(_config_of), PlainSerializer(_config_to_json)]
    shape: InputShape
    dtype: str = "float32"
    mixed: Mixed | None = None
    mode: Mode = "training"
    optimizer: Optimizer = "adamw"
    device: Name = "cpu"
    own_device: OwnDevice = None
    ranks: int = Field(default=1, ge=1)
    link: Link | None = None
    budget_bytes: int | None = Field(default=None, ge=1, le=MOST)
    reserve_bytes: int = Field(default=0, ge=0, le=MOST)
    host_bytes: int | None = Field(default=None, ge=1, le=MOST)
    loss: Name = MEAN_SQUARE
    given: tuple[Given, ...] = Field(default=(), max_length=16)
    donate: bool = False

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"unknown dtype {value[:40]!r}; choose one of: {', '.join(DTYPES)}")
        return value

    @field_validator("link")
    @classmethod
    def _possible_link(cls, value: Link | None) -> Link | None:
        if value is not None:
            with one_line():
                LinkEntry(**vars(value))
        return value

    @model_validator(mode="after")
    def _within_reach(self) -> Problem:
        if self.host_bytes and not self.training:
            raise ValueError(
                "host memory is planned for training; in inference state waits there where it must: "
                "leave host memory (--host-memory) out"
            )
        if self.mixed and self.dtype != "float32":
            raise ValueError(f"{self.mixed} has parameters in float32; leave --dtype {self.dtype} out")
        config, shape = self.config, self.shape
        if config.elements(shape) > 2**58:
            raise ValueError(f"{shape} at these widths is beyond any machine; use smaller sizes")
        if config.channels * config.widest > 2**40:  # weights
            widths = ", ".join(f"{d[-1]}={getattr(config, d[-1])}" for d in config.state.values())
            raise ValueError(f"{widths} at these heads and factors is beyond any machine; use less")
        if shape.batch > MOST_BATCH or max(self.lengths()) > MOST_LENGTH:
            raise ValueError(
                f"{shape}, batch {shape.batch} is more than is planned for; at most {MOST_LENGTH} long, "
                f"{MOST_BATCH} in a batch"
            )
        if self.config.n_block > MOST_BLOCKS:
            raise ValueError(f"{self.config.n_block} blocks are too many to plan for; at most {MOST_BLOCKS}")
        if self.donate:
            self._check_donated()
        if self.ranks > 1 and not self.config.ranks:
            raise ValueError(f"inputs of {family_of(config).name} are not shared by ranks; plan for 1 rank")
        return self

    def _check_donated(self) -> None:
        if self.training:
            raise ValueError("inputs are donated in inference only: choose that mode, or leave donate out")
        for given in self.given:
            if given.name in self.config.state:
                raise ValueError(
                    f"{given.name} cannot be donated: it is laid out otherwise or of another dtype than the "
                    "model's, and would be copied; make it as the model has it, or leave donate out"
                )

    @property
    def precision(self) -> str:
        """What arithmetic is done in: the dtype, or how it is mixed."""
        return self.mixed or self.dtype

    @property
    def autocast(self) -> str | None:
        """The dtype that torch.autocast is to use; None without it."""
        return AUTOCAST[self.mixed] if self.mixed else None

    @property
    def training(self) -> bool:
        """Whether there is a backward."""
        return self.mode == "training"

    def link_on(self, device: Device) -> Link:
        """What the ranks talk over."""
        return self.link or link_of(device, self.ranks)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole state's tensors, the batch first."""
        return self.config.state_shapes(self.shape)

    def lengths(self) -> set[int]:
        """Of the axes along which ranks may share the state: all but batch and channels."""
        return {size for shape in self.state_shapes().values() for size in shape[1:-1]}

    def mask_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the masks, which every rank is given whole."""
        whole = self.state_shapes()
        return {name: whole[of][:-1] for name, of in self.config.masks.items()}


def shape_for_alignment(
    preset_shape: InputShape,
    msa: str,
    n_seq: int | None,
    n_extra: int | None,
    skip_bad: bool = False,
    report: Callable[[str], object] = warn_skipped,
) -> InputShape:
    """The shape to plan for so that a file can be run: all its rows, or at most as many as asked for.

    In a trunk the main stack gets as many clusters as its preset, and the extra stack what they leave.

    Args:
        preset_shape: with n_extra where the model is a trunk, without n_seq where it reads the query alone.
        msa: a file with an alignment; read once.
        skip_bad: leave out bad sequences; `report` is told how many and why.

    Raises:
        ValueError: it is no alignment, or the clusters leave nothing for a trunk's extra stack.
    """
    found = alignment_shape(msa, skip_bad, report)
    rows = found.rows()
    if preset_shape.n_seq is None:
        return replace(preset_shape, n_res=found.n_res)
    if preset_shape.n_extra is None:
        return replace(preset_shape, n_seq=min(n_seq or rows, rows), n_res=found.n_res)
    clusters = min(n_seq or preset_shape.n_seq, rows)
    left = rows - clusters
    if left == 0:
        do = f"give --n-seq below {rows}" if rows > 1 else "plan for a model without one"
        raise ValueError(
            f"{msa}: all {rows} sequences are cluster centres, none is left for the extra stack; {do}"
        )
    return replace(
        preset_shape, n_seq=clusters, n_res=found.n_res, n_extra=min(n_extra or preset_shape.n_extra, left)
    )
