"""What a step under a schedule will take."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Bytes = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Prediction(BaseModel):
    """What one step under a schedule takes: peak_bytes = static_bytes + activation_bytes.

    Attributes:
        peak_bytes: the most that is on the device at any moment.
        static_bytes: parameters, gradients, optimizer, inputs; of evoplan's own stacks outputs and workspace
            as well.
        activation_bytes: what the step makes, at its peak.
        step_seconds: forward, loss and backward.
        host_bytes: the most that waits in host memory between forward and backward.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak_bytes: Annotated[Bytes, Field(ge=1)]
    static_bytes: Bytes
    activation_bytes: Bytes
    step_seconds: Annotated[Seconds, Field(gt=0)]
    host_bytes: Bytes = 0

    @model_validator(mode="after")
    def _adds_up(self) -> Prediction:
        if self.peak_bytes != self.static_bytes + self.activation_bytes:
            raise ValueError("peak_bytes is not static_bytes + activation_bytes")
        return self
