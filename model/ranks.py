"""What ranks send to each other: three collectives on shards that may differ in length, each with its
true gradient.

The collectives run inside autograd functions, whose backward is written out: c10d's own calls on tensors
that need a gradient drop it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.execution import even_spans

# The names since torch 2.13, which warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Ranks:
    """The ranks of a process group, seen from one of them.

    A tensor is cut along one dimension into one shard per rank, whose lengths differ by at most one, the
    longer ones first.

    Args:
        group: of torch.distributed, such as `mesh.get_group("dap")`; None imagines the ranks: buffers
            are made and nothing is sent, to trace one rank's share where there are no others.
        rank, size: of imagined ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int = 0, size: int = 1) -> None:
        self.group = group
        self.rank = rank if group is None else dist.get_rank(group)
        self.size = size if group is None else dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a copy of a model talks to the same ranks

    def lengths(self, size: int) -> list[int]:
        """How long each rank's shard of a dimension of that size is; ValueError where one would be empty."""
        return [span.stop - span.start for span in even_spans(size, self.size)]

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's shard, in memory of its own."""
        span = even_spans(whole.shape[dim], self.size)[self.rank]
        return whole.narrow(dim, span.start, span.stop - span.start).clone(
            memory_format=torch.contiguous_format
        )

    def join(self, own: Tensor, dim: int, size: int) -> Tensor:
        """All ranks' shards side by side along `dim`, `size` long in all (all-gather)."""
        lengths = self.lengths(size)
        padded = list(own.shape)
        padded[dim] = lengths[0]
        buffer = own.new_empty((self.size, *padded))
        if own.shape[dim] < lengths[0]:  # collectives want equal lengths
            longer = own.new_zeros(padded)
            longer.narrow(dim, 0, own.shape[dim]).copy_(own)
            own = longer
        if self.group is not None:
            _all_gather(buffer.flatten(0, 1), own.contiguous(), group=self.group)
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(buffer, lengths, strict=True)], dim)

    def sum_own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's shard of the sum of all ranks' tensors (reduce-scatter)."""
        lengths = self.lengths(whole.shape[dim])
        padded = list(whole.shape)
        padded[dim] = lengths[0]
        even = lengths[0] == lengths[-1]
        buffer = (whole.new_empty if even else whole.new_zeros)((self.size, *padded))
        for part, shard, n in zip(buffer, whole.split(lengths, dim), lengths, strict=True):
            part.narrow(dim, 0, n).copy_(shard)
        own = whole.new_empty(padded)
        if self.group is not None:
            _reduce_scatter(own, buffer.flatten(0, 1), group=self.group)
        return own.narrow(dim, 0, lengths[self.rank]).contiguous()

    def exchange(self, own: Tensor, cut: int, new_cut: int, size: int) -> Tensor:
        """From shards along `cut` (`size` long in all) to shards along `new_cut` (all-to-all)."""
        received_lengths, sent_lengths = self.lengths(size), self.lengths(own.shape[new_cut])
        shape = list(own.shape)
        shape[new_cut] = sent_lengths[self.rank]
        shape[cut] = 1
        slab = torch.Size(shape).numel()
        sent = torch.cat([part.flatten() for part in own.split(sent_lengths, new_cut)])
        sent_sizes = [own.numel() // own.shape[new_cut] * n for n in sent_lengths]
        received_sizes = [slab * n for n in received_lengths]
        received = own.new_empty(sum(received_sizes))
        if self.group is not None:
            dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group)
        del sent
        parts = received.split(received_sizes)
        shapes = [[*shape] for _ in parts]
        for part_shape, n in zip(shapes, received_lengths, strict=True):
            part_shape[cut] = n
        return torch.cat([part.view(s) for part, s in zip(parts, shapes, strict=True)], cut)

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


class Leave(torch.autograd.Function):
    """`join` for ranks that all compute the same from the whole: each takes its shard of their one gradient.

    Args of apply: ranks, this rank's shard, dim, size of the whole along it.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, own: Tensor, dim: int, size: int) -> Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        return ranks.join(own, dim, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.ranks.own(grad, ctx.dim), None, None
