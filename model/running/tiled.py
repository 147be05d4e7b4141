"""Attention tile by tile: its logits never exist in full, and nothing has to be projected again in backward.

Kept for backward are q, k and v. Backward makes each tile's weights again by the same softmax, so neither the
output nor a log-sum-exp is wanted: recomputing from one takes three passes over the tile where softmax takes
one, and where every key is masked the logits are -1e9, to which float32 cannot add a logarithm.

A tile is a few rows of the batch; where one row alone is too large, a few of its heads; then a few of its
queries, with all their keys. So no softmax is ever split over keys: the logits of one query take 400 kB
over 100,000 keys.

Source: Rabe and Staats (2021), Self-attention Does Not Need O(n^2) Memory; Dao et al. (2022), FlashAttention,
whose bias has no gradient: here it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evoplan.model.running.pieces import spans

Tile = tuple[slice, slice, slice, slice]  # of batch, rows, heads and queries


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, tile_bytes: int
) -> Tensor:
    """softmax(q k^T + mask + bias) v.

    Args:
        q, k, v: [*, rows, heads, n, c]; q is scaled.
        mask: [*, rows, n], added to the logits of each key; gets no gradient.
        bias: [*, heads, n, n], shared by all rows; gets a gradient.
        tile_bytes: most that the logits of a tile take.

    Returns:
        [*, rows, heads, n, c], laid out as q is.
    """
    shape = q.shape
    if q.ndim != 5:
        q, k, v = (x.reshape(-1, *shape[-4:]) for x in (q, k, v))
        mask = mask.reshape(-1, *mask.shape[-2:])
        bias = None if bias is None else bias.reshape(-1, *bias.shape[-3:])
    out: Tensor = _Tiled.apply(q, k, v, mask, bias, tile_bytes)  # type: ignore[no-untyped-call]
    return out if len(shape) == 5 else out.reshape(shape)


def tiles(shape: torch.Size, dtype: torch.dtype, tile_bytes: int) -> Iterator[Tile]:
    """Tiles of q [b, rows, heads, n, c], none with more logits than `tile_bytes` unless it is one query's."""
    batch, rows, heads, n, _ = shape
    query = n * max(4, dtype.itemsize)  # logits of half precision are added up in float32
    head, row = n * query, heads * n * query
    whole = max(1, tile_bytes // row)
    by_rows = -(-rows // whole)
    by_heads = 1 if row <= tile_bytes else -(-heads // max(1, tile_bytes // head))
    by_queries = 1 if head <= tile_bytes else -(-n // max(1, tile_bytes // query))
    for b in spans(batch, batch):
        for r in spans(rows, by_rows):
            for h in spans(heads, by_heads):
                for i in spans(n, by_queries):
                    yield b, r, h, i


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, tile_bytes: int
    ) -> Tensor:
        out = torch.empty_like(q)
        for tile in tiles(q.shape, q.dtype, tile_bytes):
            b, r, h, _ = tile
            weights = _weights(q, k, mask, bias, tile)
            out[tile] = weights.to(q.dtype) @ v[b, r, h]
            del weights
        ctx.save_for_backward(q, k, v, mask, bias)
        ctx.tile_bytes = tile_bytes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=_working(q))
        for tile in tiles(q.shape, q.dtype, ctx.tile_bytes):
            _tile_backward(tile, q, k, v, mask, bias, grad, grads, bias_grad)
        return *grads, None, None if bias_grad is None else bias_grad.to(bias.dtype), None


def _working(x: Tensor) -> torch.dtype:
    """In what logits and weights are: as softmax does it, float32 for half precision."""
    return torch.float32 if x.dtype.itemsize < 4 else x.dtype


def _weights(q: Tensor, k: Tensor, mask: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """[b, rows, heads, queries, n], with the additions in the order in which eager attention makes them."""
    b, r, h, i = tile
    # Casts stand here and not inside an operator, so that their memory is seen.
    logits = (q[tile] @ k[b, r, h].transpose(-1, -2)).to(_working(q))
    logits += mask[b, r, None, None].to(logits.dtype)
    if bias is not None:
        logits += bias[b, None, h, i].to(logits.dtype)
    return logits.softmax(-1)


def _tile_backward(
    tile: Tile,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    bias_grad: Tensor | None,
) -> None:
    """Write a tile's part of the gradients.

    With the weights w: dv = w^T grad and dlogits = w * (dw - sum(w * dw)), where dw = grad v^T.
    """
    b, r, h, i = tile
    keys = b, r, h
    q_grad, k_grad, v_grad = grads
    first = i.start == 0  # of the queries that share these keys
    d = grad[tile]
    weights = _weights(q, k, mask, bias, tile)
    _put(v_grad[keys], weights.to(q.dtype).transpose(-1, -2) @ d, first)
    weights_grad = (d @ v[keys].transpose(-1, -2)).to(weights.dtype)
    logits_grad = torch.ops.aten._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
    del weights, weights_grad
    if bias_grad is not None:
        bias_grad[b, h, i] += logits_grad.sum(1)
    logits_grad = logits_grad.to(q.dtype)
    q_grad[tile] = logits_grad @ k[keys]
    _put(k_grad[keys], logits_grad.transpose(-1, -2) @ q[tile], first)


def _put(total: Tensor, term: Tensor, first: bool) -> None:
    if first:
        total.copy_(term)
    else:
        total.add_(term)
