"""What `evoplan.fit` and `evoplan.inspect` are called with, looked at before the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from evoplan.planner.arguments import check_choices, check_kinds
from evoplan.planner.problems.problem import Optimizer


def check_call(
    model: Any,
    args: Any,
    kwargs: Any,
    loss: Any,
    optimizer: Any,
    device: Any,
    autocast: Any,
    knobs: Any,
) -> None:
    """ValueError for a model, or something about it, that is none; says what to give."""
    check_choices(optimizer=(optimizer, Optimizer))
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is of class {type(model).__name__}; give an nn.Module")
    if not isinstance(args, tuple | list):  # a tensor would be taken apart along its first axis
        raise ValueError(f"args are a {type(args).__name__}; give a tuple, such as (x,)")
    check_kinds(
        kwargs=(kwargs, Mapping | None, "a dictionary by the names of the model's arguments"),
        loss=(loss, Callable | None, "a function that takes the model's output and returns a scalar"),
        device=(device, str | None, "its name in the device table, or its file"),
        autocast=(autocast, torch.dtype | None, "a dtype, such as torch.bfloat16"),
        knobs=(knobs, Mapping | None, 'values by name, such as {"chunk_size": [None, 4]}'),
    )
    for name in kwargs or {}:
        if not isinstance(name, str):
            raise ValueError(f"kwargs have {name!r:.60}; give names of the model's arguments")
