"""Bytes that are there whatever the schedule: the model, its training state, inputs and outputs."""

from __future__ import annotations

from cost_model.devices import DTYPES, Device
from model.config import EvoformerConfig, InputShape

OPTIMIZER_STATES = {"none": 0, "sgd": 1, "adamw": 2}  # tensors of a parameter's size; sgd with momentum


def static_bytes(
    parameter_sizes: list[int],
    config: EvoformerConfig,
    shape: InputShape,
    dtype: str,
    device: Device,
    optimizer: str,
    training: bool,
) -> dict[str, int]:
    """Each part in bytes, every tensor rounded as the device's allocator rounds it.

    Gradients count in full: they are allocated before the step (`zero_grad(set_to_none=False)`).

    Args:
        parameter_sizes: elements of each parameter tensor.
    """
    item = DTYPES[dtype]

    def size(*elements: int) -> int:
        return sum(-(-count * item // device.block_bytes) * device.block_bytes for count in elements)

    s, r, b = shape.n_seq, shape.n_res, shape.batch
    state = size(b * s * r * config.c_m, b * r * r * config.c_z)
    parameters = size(*parameter_sizes)
    return {
        "parameters": parameters,
        "gradients": parameters if training else 0,
        "optimizer": OPTIMIZER_STATES[optimizer] * parameters if training else 0,
        # Both masks, and in how many sequences each pair of residues is present.
        "inputs": state + size(b * s * r, b * r * r, b * r * r),
        "outputs": state,
        "workspace": device.workspace_bytes,
    }
