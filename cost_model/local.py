"""The devices of this machine: by name in the table, as far as it has them, and by the clock."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import torch

from evoplan.cost_model import measure
from evoplan.cost_model.devices import DEVICES, Device

PRODUCT, COPY = 2048, 2**25  # rows of a square matrix; elements of a tensor beyond any cache
ROUNDS = 5


def local_cuda(index: int = 0) -> Device:
    """A GPU of this machine.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here; name one of the table with --device, or plan for cpu")
    properties = torch.cuda.get_device_properties(index)
    known = named(properties.name, properties.total_memory)
    source = f"{properties.name}; {known.source if known else 'not in the table, taken for an A100'}"
    return replace(
        known or DEVICES["a100-40gb"], name="cuda", memory_bytes=properties.total_memory, source=source
    )


def named(name: str, memory_bytes: int) -> Device | None:
    """The device of the table that a driver's name is of; of several sizes the nearest. None: of none."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    # "RTX 4090" is one name, "A100-SXM4-80GB" is three.
    spelled = {*words, *(first + second for first, second in pairwise(words))}
    found = [device for key, device in DEVICES.items() if key.split("-")[0] in spelled]
    return min(found, key=lambda device: abs((device.memory_bytes or 0) - memory_bytes), default=None)


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
