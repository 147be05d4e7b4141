"""Run on two gloo processes: data-parallel loops, planned against plain."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from evoplan import EvoformerStack
from tests.loops import MODES, assert_same, gradients, inputs, new_stack, planned, step

WAYS = [
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True, "find_unused_parameters": True},
]


def replicated(make: Callable[[], nn.Module], **way: Any) -> dict:
    """Two steps of two micro-batches each, the first of which is not summed over ranks."""
    stack = make()
    model = DistributedDataParallel(stack, **way)
    for _ in range(2):
        model.zero_grad()
        for micro in range(2):
            # torch's own static graph cannot begin without a sum.
            alone = micro == 0 and not way.get("static_graph")
            with model.no_sync() if alone else nullcontext():
                step(model, inputs(seed=10 * dist.get_rank() + micro))
    return gradients(stack)


def sharded(wrap: Callable[[EvoformerStack], nn.Module], per_block: bool) -> dict:
    """Two steps with parameters sharded by the root, or by blocks and the root."""
    mesh = init_device_mesh("cpu", (2,))
    stack = new_stack()
    for block in stack.blocks if per_block else ():
        fully_shard(block, mesh=mesh)
    model = wrap(stack)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        step(model, inputs(seed=10 * dist.get_rank()))
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plain = new_stack()
    for rank in range(2):
        step(plain, inputs(seed=10 * rank))
    alone = {name: grad / 2 for name, grad in gradients(plain).items()}
    for mode in MODES:
        for way in WAYS:
            assert_same(
                replicated(new_stack, **way), replicated(lambda m=mode: planned(new_stack(), m), **way)
            )
        for per_block in (False, True):
            assert_same(alone, sharded(lambda stack, m=mode: planned(stack, m), per_block))
    assert_same(alone, sharded(lambda stack: stack, per_block=True))
    dist.barrier()
    dist.destroy_process_group()
    print("all the same")


if __name__ == "__main__":
    main()
