"""Times from work: each kernel takes as long as its bottleneck.

Source: Williams, Waterman and Patterson (2009), Roofline.
"""

from __future__ import annotations

from dataclasses import dataclass

from evoplan.cost_model.devices import Device, Link
from evoplan.cost_model.trace import Work


def seconds(work: Work, device: Device, dtype: str, link: Link | None = None) -> float:
    """Time of the kernels and collectives one after the other, in seconds.

    A kernel's arithmetic and its memory traffic overlap (the larger counts); its launch does not.
    """
    flops_per_second = device.peak_flops[dtype]
    kernels = sum(
        count * (device.launch_seconds + max(flops / flops_per_second, moved / device.bandwidth))
        for (flops, moved), count in work.kernels.items()
    )
    link = link or device.link
    collectives = (
        count * (device.launch_seconds + link.seconds(sent, messages))
        for (sent, messages), count in work.collectives.items()
    )
    return kernels + sum(collectives)


def reduction_seconds(size: int, ranks: int, link: Link) -> float:
    """Time of summing `size` bytes over ranks (all-reduce by a ring), in seconds.

    Source: Patarasuk and Yuan (2009), Bandwidth optimal all-reduce algorithms.
    """
    messages = 2 * (ranks - 1)
    return link.seconds(messages * size // ranks, messages)


@dataclass(frozen=True)
class Bounds:
    """What bounds a piece of work on a device; times in seconds.

    Attributes:
        flops, bytes, launches, sent_bytes: the work: arithmetic, traffic between memory and cores, kernels,
            traffic to other ranks.
        math_seconds, memory_seconds, comms_seconds: each alone, at the device's peak rates.
        launch_seconds: starting the kernels.
        predicted_seconds: kernel after kernel, each as long as its own bottleneck (`seconds`).
    """

    flops: int
    bytes: int
    launches: int
    sent_bytes: int
    math_seconds: float
    memory_seconds: float
    comms_seconds: float
    launch_seconds: float
    predicted_seconds: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def lower_seconds(self) -> float:
        """Everything overlaps with everything."""
        return max(self.math_seconds, self.memory_seconds, self.comms_seconds)

    @property
    def upper_seconds(self) -> float:
        """Nothing overlaps."""
        return self.math_seconds + self.memory_seconds + self.comms_seconds + self.launch_seconds

    @property
    def bound(self) -> str:
        """What takes the longest: compute, memory or communication."""
        times = (self.math_seconds, self.memory_seconds, self.comms_seconds)
        return ("compute", "memory", "communication")[times.index(max(times))]


def bounds(work: Work, device: Device, dtype: str, link: Link | None = None) -> Bounds:
    """What bounds some work on a device."""
    link = link or device.link
    collectives = work.collectives.items()
    return Bounds(
        flops=work.flops,
        bytes=work.bytes,
        launches=work.launches + work.collectives.total(),
        sent_bytes=work.sent_bytes,
        math_seconds=work.flops / device.peak_flops[dtype],
        memory_seconds=work.bytes / device.bandwidth,
        comms_seconds=sum(count * link.seconds(*sent) for sent, count in collectives),
        launch_seconds=(work.launches + work.collectives.total()) * device.launch_seconds,
        predicted_seconds=seconds(work, device, dtype, link),
    )


def balance(device: Device, dtype: str) -> float:
    """FLOPs per byte above which a device is bound by its arithmetic."""
    return device.peak_flops[dtype] / device.bandwidth
