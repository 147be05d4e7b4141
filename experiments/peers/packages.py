"""Packages from PyPI (the extra `peers`), each as far as it runs on a model of two tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evoplan.experiments.peers.by_hand import ByHand, Part
from evoplan.experiments.peers.registry import Peer, Setting, UnavailableError, register


def _remat(setting: Setting, budget: float | None) -> nn.Module:
    import torch_remat as remat

    def around(part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        done: tuple[Tensor, ...] = remat.checkpoint(region_name="block")(part)(*tensors)
        return done

    return ByHand(setting.stack, around_block=around)


class _Chained(nn.Module):
    """A block of a stack that takes and gives the state alone, as packages want blocks to be."""

    def __init__(self, setting: Setting, block: int) -> None:
        super().__init__()
        hand = ByHand(setting.stack)
        group = hand.chain.groups[block]
        self.submodules = nn.ModuleList(step.submodule for step in hand.chain.steps[group.start : group.stop])
        state, constants = setting.stack.prepare(**setting.inputs)
        names, self._constants = (tuple(state), tuple(constants)), tuple(constants.values())
        self._part = partial(hand._block, block, names)

    def forward(self, *state: Tensor) -> tuple[Tensor, ...]:
        return self._part(*state, *self._constants)


class _Sequential(nn.Module):
    def __init__(self, setting: Setting, chained: Any) -> None:
        super().__init__()
        self.stack, self.outputs, self.chained = setting.stack, setting.stack.outputs, chained

    def forward(self, *, dropout_seed: int | None = None, **named: Any) -> tuple[Tensor, ...]:
        state, _ = self.stack.prepare(**named)
        names = tuple(state)
        return self.stack.results(dict(zip(names, self.chained(*state.values()), strict=True)))


def _errors(package: Any) -> tuple[type[Exception], ...]:
    """What a package raises of its own."""
    found = (getattr(package.errors, name) for name in dir(package.errors))
    return tuple(each for each in found if isinstance(each, type) and issubclass(each, Exception))


def _ckptplan(setting: Setting, budget: float | None) -> nn.Module:
    import ckptplan
    import ckptplan.errors

    problem = setting.costed.problem
    state, _ = setting.stack.prepare(**setting.inputs)
    inputs = tuple(tensor.detach() for tensor in state.values())
    model = nn.ModuleList(_Chained(setting, block) for block in range(setting.blocks))
    try:
        blocks = ckptplan.declare_blocks(model, [(f"block{i}", block) for i, block in enumerate(model)])
        profiles = ckptplan.profile_blocks(
            blocks, inputs, device=problem.device, dtype=getattr(torch, problem.dtype)
        )
        plan = ckptplan.plan_checkpoints(
            profiles, blocks, target_kind="activation_budget_bytes", target_value=int(budget or 0),
            planner="dynamic_programming",
        )  # fmt: skip
        return _Sequential(setting, ckptplan.apply_plan(blocks, plan, inputs, None))
    except _errors(ckptplan) as error:
        raise UnavailableError(str(error)) from None


def _rockmate(setting: Setting, budget: float | None) -> nn.Module:
    try:
        import rockmate
    except ImportError as error:
        raise UnavailableError(f"{error}; rockmate 2.0.0 wants an rkgb that PyPI does not have") from None

    state, _ = setting.stack.prepare(**setting.inputs)
    model = ByHand(setting.stack)
    return rockmate.Rockmate(model, tuple(state.values()), int(budget or 0))  # type: ignore[no-any-return]


register(
    Peer("torch-remat", "its checkpoint around every block", "torch_remat 0.2.2 (PyPI)", "hand", _remat),
    Peer("ckptplan", "which blocks to checkpoint, under a budget for activations", "ckptplan 0.1.0rc1 (PyPI)",
         "automatic", _ckptplan, "bytes", (0.35,)),
    Peer("rockmate", "an integer program per block, then Rotor over the chain", "rockmate 2.0.0 (PyPI)",
         "automatic", _rockmate, "bytes", (0.35,)),
)  # fmt: skip
