"""The devices of this machine: by name in the table, as far as it has them, and by the clock."""

from __future__ import annotations

from dataclasses import replace

import torch

from cost_model import measure
from cost_model.devices import DEVICES, Device

PRODUCT, COPY = 2048, 2**25  # rows of a square matrix; elements of a tensor beyond any cache
ROUNDS = 5


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


def local_cpu(dtype: str = "float32") -> Device:
    """This machine's processor, as fast as torch here multiplies large matrices and copies large tensors."""
    a, b = (torch.randn(PRODUCT, PRODUCT).to(getattr(torch, dtype)) for _ in range(2))
    source, target = torch.ones(COPY), torch.ones(COPY)
    product = min(measure.seconds(lambda: a @ b) for _ in range(ROUNDS))
    copy = min(measure.seconds(lambda: target.copy_(source)) for _ in range(ROUNDS))
    known, flops, moved = DEVICES["cpu"], 2 * PRODUCT**3, 2 * source.nbytes
    return replace(
        known,
        peak_flops={**known.peak_flops, dtype: flops / product},
        bandwidth=moved / copy,
        source=f"measured here, {torch.get_num_threads()} threads: matrices of {PRODUCT}, copies of "
        f"{source.nbytes >> 20} MiB",
    )
