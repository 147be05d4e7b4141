"""Tensors without data, as arguments of calls that are looked up."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
    """A tensor without data; strides in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """A tensor's own."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @classmethod
    def dense(
        cls, shape: Iterable[int], dtype: torch.dtype, stride: tuple[int, ...] | None = None
    ) -> TensorSpec:
        """One without gaps, unless strides are given."""
        shape = tuple(shape)
        return cls(shape, contiguous_stride(shape) if stride is None else stride, dtype)

    def empty(self, where: str) -> Tensor:
        """A tensor like it on a device."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=where)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Without gaps, in the order of its dimensions."""
        layout = zip(self.shape, self.stride, contiguous_stride(self.shape), strict=True)
        return all(size == 1 or step == dense for size, step, dense in layout)

    @property
    def transposed(self) -> TensorSpec:
        """The same elements, the last two dimensions swapped."""
        *batch, rows, columns = range(len(self.shape))
        order = (*batch, columns, rows)
        return TensorSpec(
            tuple(self.shape[i] for i in order), tuple(self.stride[i] for i in order), self.dtype
        )

    @property
    def is_dense(self) -> bool:
        """A batch of matrices without gaps, each by rows or by columns: what oneDNN reads as it lies."""
        return self.is_contiguous or self.transposed.is_contiguous

    def ones(self) -> Tensor:
        """A real tensor like it; of whole numbers zeros, which are indices of anything."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        one = int(self.dtype.is_floating_point)
        return torch.full((last + 1,), one, dtype=self.dtype).as_strided(self.shape, self.stride)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides without gaps, in the order of the dimensions."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
