"""Kernels that other people wrote: torch's fused attention, and two libraries for NVIDIA GPUs.

None of them can be traced on tensors without data: what they allocate is their own affair. So a plan uses one
only where it has been run and measured (`evoplan profile`), and found to be the formula.
"""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class KernelError(ValueError):
    """A kernel cannot do what it is asked; says why."""


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """torch's fused attention, and never its fallback, which makes the full logits.

    On the CPU that is flash attention, whose mask has no gradient: for attention without a bias, and for
    inference. On CUDA it is memory-efficient attention, which gives the bias a gradient.

    Args:
        q, k, v, mask, bias: as `tiled_attention`.

    Raises:
        KernelError: the bias needs a gradient on the CPU.
    """
    added = mask[..., None, None, :]  # [*, rows, 1, 1, n]
    if bias is not None:
        added = added + bias.unsqueeze(-4)
    if not q.is_cuda and added.requires_grad:
        raise KernelError("torch's fused attention on the CPU gives the bias no gradient")
    backend = SDPBackend.EFFICIENT_ATTENTION if q.is_cuda else SDPBackend.FLASH_ATTENTION
    added = added.expand(*q.shape[:-1], k.shape[-2]).flatten(0, -4)
    shape = q.shape
    q, k, v = (x.flatten(0, -4) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)
    return out.reshape(shape)


def cuequivariance_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """NVIDIA's cuequivariance_torch.triangle_attention; its mask tells keys that are there from others."""
    attend = import_module("cuequivariance_torch").triangle_attention
    shape = q.shape
    q, k, v, mask, bias = _batched(q, k, v, mask, bias)
    if bias is None:
        bias = q.new_zeros((q.shape[0], q.shape[2], q.shape[3], k.shape[3]))
    out: Tensor = attend(q, k, v, bias.unsqueeze(1), mask=(mask == 0)[:, :, None, None], scale=1.0)
    return out.reshape(shape)


def deepspeed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """DeepSpeed4Science's EvoformerAttention: half precision; it scales the queries itself.

    Raises:
        KernelError: the dtype is no half precision.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise KernelError(f"DeepSpeed's EvoformerAttention runs in half precision, not in {q.dtype}")
    attend = import_module("deepspeed.ops.deepspeed4science").DS4Sci_EvoformerAttention
    shape = q.shape
    q, k, v, mask, bias = _batched(q * q.shape[-1] ** 0.5, k, v, mask, bias)
    biases = [mask[:, :, None, None], None if bias is None else bias.unsqueeze(1)]
    rows_first = (x.transpose(-2, -3).contiguous() for x in (q, k, v))  # [b, rows, n, heads, c]
    out: Tensor = attend(*rows_first, biases)
    return out.transpose(-2, -3).reshape(shape)


def _batched(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """With exactly one batch dimension."""
    q, k, v = (x.reshape(-1, *x.shape[-4:]) for x in (q, k, v))
    bias = None if bias is None else bias.reshape(-1, *bias.shape[-3:])
    return q, k, v, mask.reshape(-1, *mask.shape[-2:]), bias
