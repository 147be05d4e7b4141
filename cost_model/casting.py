"""Mixed precision of code that runs without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from evoplan.model.running.context import autocast

# What a forward is run under, and its backward is not.
Casting = Callable[[], AbstractContextManager[object]]


def casting_of(kind: str, dtype: str | None) -> Casting:
    """torch.autocast of a kind of device to a dtype by name, for tensors without data; None: nothing.

    They claim to be on the CPU, where autocast leaves some operators in half precision that it runs in single
    precision on a GPU.
    """

    @contextmanager
    def casting() -> Iterator[None]:
        with (
            autocast("cpu", dtype, keep_casts=False),
            _SinglePrecision() if kind == "cuda" else nullcontext(),
        ):
            yield

    return casting if dtype else nullcontext


class _SinglePrecision(TorchFunctionMode):
    """Softmax, norms and sums in float32, as autocast on CUDA runs them.

    Source: torch's documentation of torch.amp, CUDA ops that autocast to float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _IN_SINGLE:
            args, kwargs = tree_map_only(Tensor, _single, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


_IN_SINGLE = {Tensor.softmax, torch.softmax, F.softmax, F.layer_norm, Tensor.sum, torch.sum}


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
