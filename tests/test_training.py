"""Steps of several processes: their gradients, and when they are over."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from evoplan.planner.processes.world import World
from evoplan.planner.runs.training import data_parallel
from tests.ranks import on_ranks


class Sum:
    """One that is under way until it is waited for."""

    done = False

    def wait(self) -> None:
        self.done = True


def a_step() -> tuple[int, int, bool, float]:
    """Sums under way after backward, and after the step; whether they were waited for; a gradient."""
    rank = torch.distributed.get_rank()
    world = SimpleNamespace(device=torch.device("cpu"), replicas=2, works=[])
    program = nn.Linear(3, 1, bias=False)
    parallel = data_parallel(program, world, find_unused=False)
    parallel(torch.full((1, 3), rank + 1.0)).sum().backward()
    under_way, last = len(world.works), Sum()
    world.works.append(last)
    World.settle(world)
    assert program.weight.grad is not None
    return under_way, len(world.works), last.done, float(program.weight.grad[0, 0])


def test_a_step_ends_when_its_sums_have() -> None:
    assert on_ranks(2, a_step) == [(1, 0, True, 1.5)] * 2
