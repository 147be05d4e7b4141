"""The roofline of one matrix product, on one device and split over several. Free of torch.

X[B, D] @ Y[D, F]: 2BDF FLOPs, a multiply-add counting two; X and Y are read, and the result written, once.

Source: Austin et al. (2025), How to Scale Your Model, part 1: All About Rooflines.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from evoplan.cost_model.devices import Device, Link
from evoplan.cost_model.roofline import Bounds, balance, bounds, reduction_seconds
from evoplan.cost_model.trace import Work


@dataclass(frozen=True)
class Matmul:
    """X[b, d] @ Y[d, f] with elements of so many bytes."""

    b: int
    d: int
    f: int
    element_bytes: int

    @property
    def flops(self) -> int:
        """A product and a sum for each of the b d f terms."""
        return 2 * self.b * self.d * self.f

    @property
    def bytes(self) -> int:
        """Between memory and cores: both operands and the result, once each."""
        return self.element_bytes * (self.b * self.d + self.d * self.f + self.b * self.f)

    @property
    def intensity(self) -> float:
        """FLOPs per byte; near 2b / element_bytes where b is small beside d and f."""
        return self.flops / self.bytes

    def bounds(self, device: Device, dtype: str) -> Bounds:
        """What bounds the product on one device, in seconds; as one kernel."""
        return bounds(Work(kernels=Counter({(self.flops, self.bytes): 1})), device, dtype)

    def least_batch(self, device: Device, dtype: str) -> int | None:
        """The smallest b, with this d and f, at which the device is bound by its arithmetic.

        intensity >= balance is b (2df - e I (d + f)) >= e I d f, for e bytes an element and I the balance.

        Returns:
            None: at no b, for d or f is too small.
        """
        least = self.element_bytes * balance(device, dtype)
        gain = 2 * self.d * self.f - least * (self.d + self.f)
        return None if gain <= 0 else max(1, math.ceil(least * self.d * self.f / gain))


@dataclass(frozen=True)
class Split:
    """A product split evenly over d: each device multiplies its part, and partial results are summed.

    Attributes:
        math_seconds: of one device's 2bdf / devices FLOPs at its peak.
        comms_seconds: of the ring that sums the partial results, b f elements, on all devices. Of two devices
            each sends its whole partial result to the other.
        whole_seconds: of the product on one device, at its peak.
        least_d: the smallest d at which the arithmetic takes as long as the sum, whatever d is here.
    """

    devices: int
    math_seconds: float
    comms_seconds: float
    whole_seconds: float
    least_d: int

    @property
    def bound(self) -> str:
        """What takes longer: compute or communication."""
        return "compute" if self.math_seconds >= self.comms_seconds else "communication"

    @property
    def lower_seconds(self) -> float:
        """Both overlap."""
        return max(self.math_seconds, self.comms_seconds)

    @property
    def upper_seconds(self) -> float:
        """One after the other."""
        return self.math_seconds + self.comms_seconds


def split(product: Matmul, devices: int, device: Device, dtype: str, link: Link) -> Split:
    """The network roofline of a product that is split over d; sums of partial results cost no arithmetic.

    Raises:
        ValueError: fewer than two devices, or more than d has elements.
    """
    if not 2 <= devices <= product.d:
        raise ValueError(
            f"a product of D = {product.d} is split over 2 to {product.d} devices, not {devices}"
        )
    peak = device.peak_flops[dtype]
    comms = reduction_seconds(product.b * product.f * product.element_bytes, devices, link)
    whole = product.flops / peak
    # 2 b d f / (devices peak) >= comms
    least = math.ceil(comms * devices * peak / (2 * product.b * product.f))
    return Split(devices, whole / devices, comms, whole, max(devices, least))
