"""Bytes that are there whatever the schedule: the model, its training state, inputs and outputs."""

from __future__ import annotations

from evoplan.cost_model.devices import DTYPES, Device

OPTIMIZER_STATES = {"none": 0, "sgd": 1, "adamw": 2}  # tensors of a parameter's size; sgd with momentum


def static_bytes(
    parameter_sizes: list[tuple[int, bool]],
    input_bytes: int,
    output_bytes: int,
    dtype: str,
    device: Device,
    optimizer: str,
    training: bool,
    reserve_bytes: int = 0,
) -> dict[str, int]:
    """Each part in bytes, every tensor rounded as the device's allocator rounds it.

    Gradients count in full: they are allocated before the step (`zero_grad(set_to_none=False)`).

    Args:
        parameter_sizes: elements of each parameter tensor, and whether it is trained.
        input_bytes: what forward is given and the constants made from it.
        output_bytes: what it returns.
        reserve_bytes: kept free for what is not planned.
    """
    item = DTYPES[dtype]
    parameters = [(device.in_blocks(count * item), trained) for count, trained in parameter_sizes]
    trained = sum(size for size, trained in parameters if trained) if training else 0
    parts = {
        "parameters": sum(size for size, _ in parameters),
        "gradients": trained,
        "optimizer": OPTIMIZER_STATES[optimizer] * trained,
        "inputs": input_bytes,
        "outputs": output_bytes,
        "workspace": device.workspace_bytes,
    }
    return parts | ({"reserve": reserve_bytes} if reserve_bytes else {})
