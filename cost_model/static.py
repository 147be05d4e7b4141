"""Bytes that are there whatever the schedule: the model, its training state, inputs and outputs."""

from __future__ import annotations

from math import prod

from cost_model.devices import DTYPES, Device
from model.config import InputShape, ModelConfig

OPTIMIZER_STATES = {"none": 0, "sgd": 1, "adamw": 2}  # tensors of a parameter's size; sgd with momentum


def static_bytes(
    parameter_sizes: list[int],
    config: ModelConfig,
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

    shapes = config.state_shapes(shape)
    masks = [shapes[name][:-1] for name in config.masks.values()]
    # In how many sequences each pair of residues is present, once for each alignment.
    masks += [shapes["z"][:-1]] * (len(shapes) - 1)
    parameters = size(*parameter_sizes)
    return {
        "parameters": parameters,
        "gradients": parameters if training else 0,
        "optimizer": OPTIMIZER_STATES[optimizer] * parameters if training else 0,
        "inputs": size(*map(prod, shapes.values()), *map(prod, masks)),
        "outputs": size(prod(shapes["m"]), prod(shapes["z"])),
        "workspace": device.workspace_bytes,
    }
