"""torch.compile, and the budgets of its partitioner between forward and backward."""

from __future__ import annotations

import contextlib
import shutil
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from evoplan.experiments.peers.by_hand import ByHand, Part
from evoplan.experiments.peers.registry import Peer, Setting, UnavailableError, register

SOURCE = "torch._functorch.config.activation_memory_budget"
REGION = "torch.autograd.graph.region_activation_memory_budget"
FRACTIONS = (0.05, 0.1, 0.3, 0.5, 0.9)
FEW = (0.1, 0.5)


def _compiler(backend: str) -> Any:
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UnavailableError("inductor compiles C++ on a CPU: install a C++ compiler")
    torch._dynamo.reset()  # whoever was compiled before is done
    return partial(torch.compile, backend=backend, dynamic=False)


class _Under(nn.Module):
    """A module whose compilation, at its first call, falls under a setting."""

    def __init__(self, inner: nn.Module, outputs: tuple[str, ...], budget: float | None) -> None:
        super().__init__()
        self.inner, self.outputs, self.budget = inner, outputs, budget

    def forward(self, *tensors: Tensor, **named: Any) -> tuple[Tensor, ...]:
        limits = torch._dynamo.config.patch(recompile_limit=256)
        budget = (
            contextlib.nullcontext() if self.budget is None
            else functorch_config.patch(activation_memory_budget=self.budget)
        )  # fmt: skip
        with limits, budget:
            done: tuple[Tensor, ...] = self.inner(*tensors, **named)
        return done


def _whole(backend: str, setting: Setting, budget: float | None) -> nn.Module:
    compiled = _compiler(backend)(ByHand(setting.stack))
    return _Under(compiled, setting.stack.outputs, budget)


def _per_block(backend: str, setting: Setting, budget: float | None) -> nn.Module:
    made: dict[int, Part] = {}
    compiler = _compiler(backend)

    def around(part: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        block = part.args[0]
        if block not in made:
            made[block] = compiler(lambda *given: part(*given))
        return made[block](*tensors)

    return _Under(ByHand(setting.stack, around_block=around), setting.stack.outputs, budget)


def _regions(setting: Setting, budget: float | None) -> nn.Module:
    region = getattr(torch.autograd.graph, "region_activation_memory_budget", None)
    if region is None:
        raise UnavailableError(f"this torch has no {REGION}; use 2.13 or later")
    made: dict[int, Part] = {}
    compiler = _compiler("aot_eager")

    def around(part: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        block = part.args[0]
        if block not in made:

            def limited(*given: Tensor) -> tuple[Tensor, ...]:
                with region(budget):
                    return part(*given)  # type: ignore[no-any-return]

            made[block] = compiler(limited)
        return made[block](*tensors)

    return _Under(ByHand(setting.stack, around_block=around), setting.stack.outputs, None)


def _budget(name: str, about: str, apply: Any, budgets: tuple[float, ...], source: str = SOURCE) -> Peer:
    return Peer(name, about, source, "automatic", apply, "fraction", budgets)


register(
    Peer("compile", "torch.compile of the whole model, inductor", "torch.compile", "automatic",
         partial(_whole, "inductor")),
    _budget("memory-budget", "the partitioner's budget, one graph of the whole model, aot_eager",
            partial(_whole, "aot_eager"), FEW),
    _budget("memory-budget-block", "the same per block, aot_eager",
            partial(_per_block, "aot_eager"), FRACTIONS),
    _budget("memory-budget-block-inductor", "the same per block, inductor",
            partial(_per_block, "inductor"), FEW),
    _budget("region-budget", "a budget for the region of each block, aot_eager", _regions, (0.1,), REGION),
)  # fmt: skip
