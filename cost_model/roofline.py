"""Times from work: each kernel takes as long as its bottleneck.

Source: Williams, Waterman and Patterson (2009), Roofline.
"""

from __future__ import annotations

from cost_model.devices import Device
from cost_model.trace import Work


def seconds(work: Work, device: Device, dtype: str) -> float:
    """Time of the kernels one after the other, in seconds.

    A kernel's arithmetic and its memory traffic overlap (the larger counts); its launch does not.
    """
    flops_per_second = device.peak_flops[dtype]
    return sum(
        count * (device.launch_seconds + max(flops / flops_per_second, moved / device.bandwidth))
        for (flops, moved), count in work.kernels.items()
    )
