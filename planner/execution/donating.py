"""Taking what a caller gives for good: its memory is the chain's then, and the caller's tensors are empty.

A tensor can be taken that is alone with its memory. Whoever else can see that (a view, a larger tensor of
which it is a part, an array) would find it written over, and would keep it from being freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from evoplan.model.running.chain import State
from evoplan.model.running.internals import handles, has_data, holders, storage_key


def check_there(given: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """See that what is to be taken has not been taken already.

    Raises:
        ValueError: it has; names it.
    """
    for name in names:
        if given[name].shape == (0,):
            raise ValueError(f"{name} is empty: a call has taken it; give another tensor")


def taken(
    state: State, given: Mapping[str, Tensor], others: Iterable[Tensor], dtype: torch.dtype | None = None
) -> State:
    """The state in tensors that nobody else holds.

    Args:
        state: as the model makes it of what is given.
        given: by the caller, under the same names; empty afterwards.
        others: what is given besides, and the model's own tensors.
        dtype: that the model computes in, where autocast does not see to it.

    Raises:
        ValueError: one cannot be taken; none has been, then.
    """
    elsewhere = set(map(storage_key, others))
    for name, tensor in given.items():
        reason = _why_not(tensor, state[name], elsewhere)
        if dtype is not None and tensor.dtype != dtype:
            reason = f"it is {tensor.dtype}, and the model {dtype}"
        if reason is not None:
            raise ValueError(
                f"{name} cannot be donated: {reason}; give a contiguous tensor that nobody else looks at "
                f"(such as {name}.clone()), or plan without donated inputs"
            )
        elsewhere.add(storage_key(tensor))
    return {name: _take(tensor) for name, tensor in given.items()}


def _take(tensor: Tensor) -> Tensor:
    own = tensor.detach()
    tensor.set_()  # type: ignore[call-overload]
    return own


def _why_not(tensor: Tensor, made: Tensor, elsewhere: set[int]) -> str | None:
    """Why a tensor cannot be taken; None: it can.

    Args:
        made: the state's tensor, which is a copy where the model wants another layout or dtype.
        elsewhere: storages of other tensors.
    """
    if tensor.requires_grad:
        return "it requires a gradient"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "it was made under torch.inference_mode, and the model is called outside"
    if storage_key(made) != storage_key(tensor):
        return "it is not contiguous or of another dtype than the model's, and would be copied"
    if tensor.untyped_storage().nbytes() != tensor.nbytes:  # without a name for it, which would count
        return "it is a part of a larger tensor"
    if storage_key(tensor) in elsewhere:
        return "it shares its memory with another input or with the model"
    if not has_data(tensor):
        return None
    in_shared_memory = tensor.device.type == "cpu" and tensor.is_shared()
    resizable = tensor.untyped_storage().resizable()
    if in_shared_memory or not resizable or holders(tensor) > 1 or handles(tensor) > 1:
        return (
            "something else holds its memory, such as a view, its storage, an array or a graph for backward"
        )
    return None
