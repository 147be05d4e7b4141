"""What ranks send to each other: three collectives on shards that may differ in length, each with its
true gradient.

The collectives run inside autograd functions, whose backward is written out: c10d's own calls on tensors
that need a gradient drop it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from evoplan.model.running.pieces import even_spans, note_sent

# The names since torch 2.13, which warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Ranks:
    """The ranks of a process group, seen from one of them.

    A tensor is cut along one dimension into one shard per rank, whose lengths differ by at most one, the
    longer ones first. With gloo all goes by all-to-all, which takes shards of any lengths: its all-gather and
    reduce-scatter need the same memory, but out of sight, in copies that its own threads release.

    Args:
        group: of torch.distributed, such as `mesh.get_group("dap")`; None imagines the ranks: buffers
            are made and nothing is sent, to trace one rank's share where there are no others.
        rank, size: of imagined ranks.
        backend: of imagined ranks.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, rank: int = 0, size: int = 1, backend: str = "nccl"
    ) -> None:
        self.group = group
        self.rank = rank if group is None else dist.get_rank(group)
        self.size = size if group is None else dist.get_world_size(group)
        self.backend = backend if group is None else dist.get_backend(group)

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size} over {self.backend}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a copy of a model talks to the same ranks

    def lengths(self, size: int) -> list[int]:
        """How long each rank's shard of a dimension of that size is; ValueError where one would be empty."""
        return [span.stop - span.start for span in even_spans(size, self.size)]

    def span(self, size: int) -> slice:
        """Where this rank's shard of a dimension of that size lies."""
        return even_spans(size, self.size)[self.rank]

    def own_shape(self, shape: Sequence[int], dim: int) -> tuple[int, ...]:
        """The shape of this rank's shard."""
        return tuple(_resized(shape, dim, self.lengths(shape[dim])[self.rank]))

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's shard, in memory of its own."""
        span = self.span(whole.shape[dim])
        return whole.narrow(dim, span.start, span.stop - span.start).clone(
            memory_format=torch.contiguous_format
        )

    def join(self, own: Tensor, dim: int, size: int) -> Tensor:
        """All ranks' shards side by side along `dim`, `size` long in all (all-gather)."""
        lengths = self.lengths(size)
        if self.backend == "gloo":
            return torch.cat(
                self._swap([own] * self.size, [_resized(own.shape, dim, n) for n in lengths]), dim
            )
        longest = _resized(own.shape, dim, lengths[0])
        if own.shape[dim] < lengths[0]:  # collectives want equal lengths
            longer = own.new_zeros(longest)
            longer.narrow(dim, 0, own.shape[dim]).copy_(own)
            own = longer
        buffer = own.new_empty((self.size, *longest))
        if self.group is None:
            note_sent((self.size - 1) * own.nbytes, self.size - 1)
        else:
            _all_gather(buffer.flatten(0, 1), own.contiguous(), group=self.group)
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(buffer, lengths, strict=True)], dim)

    def sum_own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's shard of the sum of all ranks' tensors (reduce-scatter): the transpose of `join`."""
        lengths = self.lengths(whole.shape[dim])
        shards = whole.split(lengths, dim)
        if self.backend == "gloo":
            first, *others = self._swap(shards, [_resized(whole.shape, dim, lengths[self.rank])] * self.size)
            total = first.clone()
            for other in others:
                total += other
            return total
        longest = _resized(whole.shape, dim, lengths[0])
        make = whole.new_empty if lengths[0] == lengths[-1] else whole.new_zeros
        buffer = make((self.size, *longest))
        for part, shard in zip(buffer, shards, strict=True):
            part.narrow(dim, 0, shard.shape[dim]).copy_(shard)
        own = whole.new_empty(longest)
        if self.group is None:
            note_sent((self.size - 1) * own.nbytes, self.size - 1)
        else:
            _reduce_scatter(own, buffer.flatten(0, 1), group=self.group)
        return own.narrow(dim, 0, lengths[self.rank]).contiguous()

    def exchange(self, own: Tensor, cut: int, new_cut: int, size: int) -> Tensor:
        """From shards along `cut` (`size` long in all) to shards along `new_cut` (all-to-all)."""
        lengths, new_lengths = self.lengths(size), self.lengths(own.shape[new_cut])
        kept = _resized(own.shape, new_cut, new_lengths[self.rank])
        shapes = [_resized(kept, cut, n) for n in lengths]
        return torch.cat(self._swap(own.split(new_lengths, new_cut), shapes), cut)

    def _swap(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send the k-th piece to the k-th rank; what came from each rank in turn, of these shapes."""
        sent_sizes = [piece.numel() for piece in pieces]
        received_sizes = [prod(shape) for shape in shapes]
        sent = pieces[0].new_empty(sum(sent_sizes))
        for part, piece in zip(sent.split(sent_sizes), pieces, strict=True):
            part.view(piece.shape).copy_(piece)
        received = sent.new_empty(sum(received_sizes))
        if self.group is None:
            note_sent((sum(sent_sizes) - sent_sizes[self.rank]) * sent.element_size(), self.size - 1)
        else:
            into, out_of = (lend(received), lend(sent)) if self.backend == "gloo" else (received, sent)
            dist.all_to_all_single(into, out_of, received_sizes, sent_sizes, group=self.group)
        parts = received.split(received_sizes)
        return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]

    def agree(self, number: int, device: torch.device) -> int:
        """The first rank's number, on all ranks."""
        if self.group is None:
            return number
        tensor = torch.tensor(number, dtype=torch.int64, device=device)
        dist.broadcast(tensor, group=self.group, group_src=0)
        return int(tensor.item())

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of all ranks' (all-reduce)."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)


def lend(tensor: Tensor) -> Tensor:
    """The same memory, not owned; the tensor has to outlive the use of it.

    gloo's threads let go of tensors when they come to it. What they are given must not be freed by that: the
    buffer would outlive its collective, and no allocator event would tell when it went.
    """
    if type(tensor) is not Tensor or not tensor.is_cpu or not tensor.nbytes:  # a fake one has no memory
        return tensor
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype)


def _resized(shape: Sequence[int], dim: int, length: int) -> list[int]:
    new = list(shape)
    new[dim] = length
    return new


class Gather(torch.autograd.Function):
    """`join` for ranks that use the whole each in its own way: their gradients of it are summed.

    Args of apply: ranks, this rank's shard, dim, size of the whole along it.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, own: Tensor, dim: int, size: int) -> Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        return ranks.join(own, dim, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.ranks.sum_own(grad, ctx.dim), None, None


class Exchange(torch.autograd.Function):
    """`exchange`; its backward is the reverse exchange.

    Args of apply: ranks, this rank's shard, cut, new cut, size of the whole along the cut.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, own: Tensor, cut: int, new_cut: int, size: int) -> Tensor:
        ctx.ranks, ctx.back = ranks, (new_cut, cut, own.shape[new_cut])
        return ranks.exchange(own, cut, new_cut, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.ranks.exchange(grad, *ctx.back), None, None, None


class Enter(torch.autograd.Function):
    """This rank's shard of what all ranks hold; backward gives every rank the whole gradient.

    Args of apply: ranks, the whole, dim.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, whole: Tensor, dim: int) -> Tensor:
        ctx.ranks, ctx.dim, ctx.size = ranks, dim, whole.shape[dim]
        return ranks.own(whole, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.ranks.join(grad, ctx.dim, ctx.size), None


class Leave(Gather):
    """`join` for ranks that all compute the same from the whole: each takes its shard of the one gradient."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.ranks.own(grad, ctx.dim), None, None
