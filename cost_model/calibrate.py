"""A few constants that make the roofline fit what was measured on a device.

Peak arithmetic and bandwidth of a data sheet are never reached; how nearly they are depends on the kernels.
From times of steps and the work that they did follow the rates that this device reaches, and these carry over
to shapes that were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from evoplan.cost_model.devices import DTYPES, Device
from evoplan.cost_model.trace import Work

LEAST_ROWS = 12
REACH = 1e4  # of what is fitted, times or part of a data sheet's figure


@dataclass(frozen=True)
class Calibration:
    """Fitted constants and how well they fit.

    Attributes:
        flops: FLOP/s that matrix products reach.
        bandwidth: bytes per second that kernels reach.
        launch_seconds: per kernel.
        error: median of |predicted / measured - 1| over what it was fitted to.
        rows: how many times that were.
    """

    flops: float
    bandwidth: float
    launch_seconds: float
    error: float
    rows: int

    def applied(self, device: Device, dtype: str) -> Device:
        """The device with these constants for its own."""
        return replace(
            device,
            peak_flops={**device.peak_flops, dtype: self.flops},
            bandwidth=self.bandwidth,
            launch_seconds=self.launch_seconds,
        )

    def described(self, device: Device, dtype: str) -> Device:
        """The same under a name of its own; its source says which figures are fitted and which are not.

        Args:
            dtype: of the products, whatever else mixed precision has.
        """
        listed = {name: rate for name, rate in device.peak_flops.items() if name in DTYPES}
        source = (
            f"{dtype} FLOP/s, bandwidth and launch_seconds fitted to {self.rows} times measured on it, "
            f"half within {self.error:.0%}; other figures: {device.source}"
        )
        return replace(
            self.applied(replace(device, peak_flops=listed), dtype),
            name=f"{device.name}-calibrated",
            source=source,
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, constants: Any) -> Calibration:
        """The inverse; ValueError where they are none, or no amounts."""
        try:
            found = cls(**constants)
        except TypeError:
            raise ValueError("a calibration that lacks constants, or has others") from None
        for name, value in constants.items():
            kind = int if name == "rows" else float
            least = 0 if name == "error" else math.ulp(0)  # a fit may be exact
            if type(value) is not kind or not least <= value < math.inf:
                raise ValueError(f"{name} of a calibration is {value!r:.40}")
        return found


def fit(measured: Sequence[tuple[Work, float]], device: Device, dtype: str) -> Calibration:
    """The constants whose roofline is nearest to the measured seconds, by the logarithm of their ratio.

    Args:
        device: whose figures are where the search starts.

    Raises:
        ValueError: too few measurements.
    """
    from scipy.optimize import least_squares  # half a second that few commands need

    if len(measured) < LEAST_ROWS:
        raise ValueError(f"{len(measured)} measured times are too few to calibrate; it takes {LEAST_ROWS}")
    counted = [
        np.array([(*kernel, count) for kernel, count in work.kernels.items()], dtype=float)
        for work, _ in measured
    ]
    ends = np.cumsum([len(kernels) for kernels in counted])[:-1]
    flops, moved, counts = np.concatenate(counted).T
    seconds = np.array([seconds for _, seconds in measured])

    def ratios(logs: np.ndarray) -> np.ndarray:
        rate, bandwidth, launch = np.exp(logs)
        kernels = counts * (launch + np.maximum(flops / rate, moved / bandwidth))
        found: np.ndarray = np.array([part.sum() for part in np.split(kernels, ends)]) / seconds
        return found

    start = np.log([device.peak_flops[dtype], device.bandwidth, device.launch_seconds])
    # What bounds none of the kernels that were measured may be any number: it stays within reach.
    bounds = start - np.log(REACH), start + np.log(REACH)
    found = least_squares(
        lambda logs: np.log(ratios(logs)), start, bounds=bounds, loss="soft_l1", f_scale=0.1
    )
    rate, bandwidth, launch = map(float, np.exp(found.x))
    error = float(np.median(np.abs(ratios(found.x) - 1)))
    return Calibration(rate, bandwidth, launch, error, len(measured))
