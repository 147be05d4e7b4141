"""Freed memory waits for the next tensor; gradients of moved tensors lie as their readers want them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from evoplan.model.running.layout import channels_first, channels_last

MIB = 2**20
FAULTS = f"""
import resource, torch
from evoplan.cost_model.allocator import give_back_freed_memory, keep_freed_memory
print(keep_freed_memory())
def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * {MIB}, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(touched() for _ in range(20)))  # aligned chunks find each other only by and by
give_back_freed_memory()
print(touched())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_unless_the_environment_says_how() -> None:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name not in ("GLIBC_TUNABLES", "LD_PRELOAD")
    }

    def said(**variables: str) -> list[str]:
        process = subprocess.run(
            [sys.executable, "-c", FAULTS], env=clean | variables, capture_output=True, text=True, check=True
        )
        return process.stdout.split()

    pages = 64 * MIB // os.sysconf("SC_PAGE_SIZE")
    kept, faults, faults_after_trim = said()
    assert kept == "True"
    assert int(faults) < pages / 100
    assert int(faults_after_trim) > pages / 2
    kept, faults, _ = said(MALLOC_ARENA_TEST="8")  # the default: nothing else changes
    assert kept == "False"
    assert int(faults) > pages / 2


def test_moved_tensors_and_their_gradients() -> None:
    """As movedim, to any order of derivatives, but gradients are contiguous."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(channels_first(x), x.movedim(-1, -3))
    assert torch.equal(channels_last(x), x.movedim(-3, -1))
    assert torch.autograd.gradcheck(channels_first, x)
    assert torch.autograd.gradgradcheck(channels_last, x)
    for moved in (channels_first, channels_last):
        y = moved(x)
        assert y.is_contiguous()
        (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert grad.is_contiguous()
    alone = torch.randn(1, 1, 5, dtype=torch.float64)  # nothing to be moved
    channels_first(alone).zero_()
    assert alone.all()


def test_moved_tensors_under_torch_func() -> None:
    x, tangent = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    pairs = [(channels_first, lambda x: x.movedim(-1, -3)), (channels_last, lambda x: x.movedim(-3, -1))]
    for moved, plain in pairs:
        gradients = [torch.func.grad(lambda x, move=move: move(x).sin().sum())(x) for move in (moved, plain)]
        assert torch.equal(*gradients)
        assert torch.equal(torch.func.vmap(moved)(x), plain(x))
        for got, true in zip(*(torch.func.jvp(f, (x,), (tangent,)) for f in (moved, plain)), strict=True):
            assert torch.equal(got, true)
