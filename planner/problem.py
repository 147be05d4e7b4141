"""What is planned for: a model, its shapes, a device and a budget."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cost_model.devices import DTYPES
from model.config import EvoformerConfig, InputShape

Mode = Literal["training", "inference"]
Optimizer = Literal["none", "sgd", "adamw"]


class Problem(BaseModel):
    """The question a plan answers.

    Attributes:
        model: name of the preset it started from, or "custom".
        budget_bytes: what the device may hold at the peak of a step; None is unlimited.
        ranks: devices that share the model; one so far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    config: EvoformerConfig
    shape: InputShape
    dtype: str = "float32"
    mode: Mode = "training"
    optimizer: Optimizer = "adamw"
    device: str = "cpu"
    ranks: Literal[1] = 1
    budget_bytes: int | None = Field(default=None, ge=1)

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"unknown dtype {value!r}; choose one of: {', '.join(DTYPES)}")
        return value

    @model_validator(mode="after")
    def _within_reach(self) -> Problem:
        # The largest tensors: attention weights, the outer product, a transition's hidden layer.
        c, (s, r, b) = self.config, (self.shape.n_seq, self.shape.n_res, self.shape.batch)
        heads = max(c.n_head_msa * c.c_head_msa, c.n_head_pair * c.c_head)
        widest = max(heads, c.transition_factor * max(c.c_m, c.c_z), c.c_opm**2, c.c_tri)
        if b * max(s, r) ** 2 * r * widest > 2**58:
            raise ValueError(
                f"s={s}, r={r}, batch {b} at these widths is beyond any machine; use smaller sizes"
            )
        return self

    @property
    def training(self) -> bool:
        """Whether there is a backward."""
        return self.mode == "training"

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of m and z, the batch first."""
        shape, config = self.shape, self.config
        return {
            "m": (shape.batch, shape.n_seq, shape.n_res, config.c_m),
            "z": (shape.batch, shape.n_res, shape.n_res, config.c_z),
        }
