"""Times from work: each kernel takes as long as its bottleneck.

Source: Williams, Waterman and Patterson (2009), Roofline.
"""

from __future__ import annotations

from cost_model.devices import Device, Link
from cost_model.trace import Work


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
