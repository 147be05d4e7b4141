"""evoplan itself, the flat program that it grew from, and saving on the host."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evoplan.experiments.peers.plans import least_bytes, plan_within
from evoplan.experiments.peers.registry import SHARES, Peer, Setting, UnavailableError, register
from evoplan.planner.execution.applying import apply_plan
from evoplan.planner.plans.planning import NoPlanError


def _planned(solver: str, setting: Setting, budget: float | None) -> nn.Module:
    try:
        plan = plan_within(setting, int(budget or 0), solver)
    except NoPlanError as error:
        raise UnavailableError(str(error)) from None
    return apply_plan(setting.stack, plan)


def _least(setting: Setting, budget: float | None) -> nn.Module:
    return apply_plan(setting.stack, plan_within(setting, least_bytes(setting)))


class _OnHost(nn.Module):
    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.stack, self.outputs = stack, stack.outputs

    def forward(self, **named: Any) -> tuple[Tensor, ...]:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            done: tuple[Tensor, ...] = self.stack(**named)
        return done


def _saved_on_host(setting: Setting, budget: float | None) -> nn.Module:
    if setting.costed.problem.device == "cpu":
        raise UnavailableError("the device is the CPU: what is saved there already lies there")
    return _OnHost(setting.stack)


register(
    Peer("save-on-cpu", "what is saved goes to host memory", "torch.autograd.graph.save_on_cpu",
         "hand", _saved_on_host),
    Peer("seed-dp", "the flat program over submodules: keep, pieces or recompute", "evoplan",
         "automatic", partial(_planned, "seed-dp"), "bytes", SHARES),
    Peer("evoplan-least", "the plan that needs the least memory", "evoplan", "ours", _least),
    Peer("evoplan", "the fastest plan within a budget", "evoplan", "ours", partial(_planned, "dp"), "bytes",
         (0.025, 0.05, *SHARES, 0.8, 1.0)),
)  # fmt: skip
