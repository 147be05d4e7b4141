"""The GPU of this machine, described by what torch knows and the table where it knows the name."""

from __future__ import annotations

from dataclasses import replace

import torch

from cost_model.devices import DEVICES, Device


def local_cuda() -> Device:
    """This machine's first GPU.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here; name one of the table with --device, or plan for cpu")
    properties = torch.cuda.get_device_properties(0)
    words = properties.name.lower().replace("-", " ").split()
    known = next((d for name, d in DEVICES.items() if name.split("-")[0] in words), DEVICES["a100-40gb"])
    return replace(
        known, name="cuda", memory_bytes=properties.total_memory, source=f"{properties.name}; {known.source}"
    )
