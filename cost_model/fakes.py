"""Tensors and modules without data: shapes, dtypes and strides alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from evoplan.model.foreign.capture import CaptureError

SomeModule = TypeVar("SomeModule", bound=nn.Module)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Tensors made inside have shapes and no data. They claim to be on the CPU, whatever is planned for.

    What fails there is raised, and said once: torch writes a traceback to its log as well.
    """
    failed = _Failed()
    _LOG.addFilter(failed)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            yield mode
    finally:
        _LOG.removeFilter(failed)


_LOG = logging.getLogger(FakeTensorMode.__module__)


class _Failed(logging.Filter):
    """Leaves out of a log that an operator failed, as the error that follows says."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and str(record.msg).startswith("failed while attempting to run meta"))


@contextmanager
def real_tensors_too() -> Iterator[None]:
    """Inside `fake_tensors`, operators may take real tensors: labels that a loss has at hand."""
    mode = torch._guards.detect_fake_mode()
    if mode is None:  # on the meta device
        yield
        return
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


@contextmanager
def unseen() -> Iterator[None]:
    """What is made inside has no data, as outside, and no trace counts it."""
    mode = torch._guards.detect_fake_mode()
    with _disable_current_modes(), torch.device("meta") if mode is None else mode:
        yield


def fake_copy(module: SomeModule, dtype: torch.dtype | None = None, where: str = "cpu") -> SomeModule:
    """The same module with parameters, buffers and other tensors that have no data.

    Args:
        where: meta; or cpu, inside `fake_tensors`.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        data = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=where)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=where)
    with _WithoutData(where):
        return copy.deepcopy(module, memo)


class _WithoutData(TorchFunctionMode):
    """Tensors that a copy comes upon in attributes, lists and objects are made anew, without data."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if tensor.grad_fn is not None:
            raise CaptureError(
                f"a module has a tensor {tuple(tensor.shape)} with a graph in an attribute, of which blocks "
                "that run again would cut off the gradient; hand it to them as an argument, and return it"
            )
        if id(tensor) not in memo:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.where)
            memo[id(tensor)] = empty.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]
