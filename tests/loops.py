"""A small model, planned as tightly and as roomily as can be, for the loops that people train it in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from evoplan import EvoformerConfig, EvoformerStack, NoPlanError, Plan, apply_plan, make_plan
from evoplan.planner.execution.apply import PlannedModule
from tests.conftest import TINY, randomise

S, R = 5, 7
MODES = ("tight", "roomy")


def new_stack(
    config: EvoformerConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 0
) -> EvoformerStack:
    """The model with random weights, in training mode."""
    return randomise(EvoformerStack(config).to(dtype), seed).train()


def inputs(
    config: EvoformerConfig = TINY,
    s: int = S,
    r: int = R,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """m, z and masks of which a fifth is zero; no leaf asks for a gradient."""
    g = torch.Generator().manual_seed(seed)
    return {
        "m": torch.randn(batch, s, r, config.c_m, generator=g, dtype=torch.float64).to(dtype),
        "z": torch.randn(batch, r, r, config.c_z, generator=g, dtype=torch.float64).to(dtype),
        "msa_mask": (torch.rand(batch, s, r, generator=g) > 0.2).to(dtype),
        "pair_mask": (torch.rand(batch, r, r, generator=g) > 0.2).to(dtype),
    }


@cache
def plan(
    mode: str,
    config: EvoformerConfig = TINY,
    s: int = S,
    r: int = R,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
) -> Plan:
    """The plan of the least budget ("tight": everything runs again, much in pieces) or of none ("roomy")."""
    stack, given = new_stack(config, dtype), inputs(config, s, r, batch, dtype)
    asked = {"times": "roofline", "autocast": autocast}
    budget = None
    if mode == "tight":
        try:
            make_plan(stack, given.values(), budget=1000, **asked)
        except NoPlanError as error:
            budget = error.least_feasible_bytes
    return make_plan(stack, given.values(), budget=budget, **asked)


def planned(stack: EvoformerStack, mode: str, **problem) -> PlannedModule:
    """A stack under a plan."""
    return apply_plan(stack, plan(mode, **problem))


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """A mean of squares that tells every channel from the others."""
    terms = ((x * torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype)).square().mean() for x in outputs)
    return sum(terms, torch.zeros((), dtype=outputs[0].dtype))


def step(model: nn.Module, given: dict[str, Tensor]) -> None:
    """One plain training step's gradients."""
    loss_of(model(**given, dropout_seed=7)).backward()


def gradients(model: nn.Module, **leaves: Tensor) -> dict[str, Tensor | None]:
    """Copies of all gradients there are: of parameters by name, and of some leaves."""
    named = {**dict(model.named_parameters()), **leaves}
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in named.items()}


def assert_same(
    expected: dict[str, Tensor | None], got: dict[str, Tensor | None], error: float = 1e-11
) -> None:
    """Gradients missing on both sides or on none, and nowhere off by more than `error` of the largest."""
    assert expected.keys() == got.keys()
    assert [name for name in got if (got[name] is None) != (expected[name] is None)] == []
    found = {name: grad for name, grad in expected.items() if grad is not None}
    assert found, "no gradient at all"
    largest = max(float(grad.abs().max()) for grad in found.values())
    assert largest > 0
    for name, grad in found.items():
        off = float((got[name] - grad).abs().max()) / largest
        assert off <= error, f"{name} is off by {off:.2g}"


def compare(
    mode: str,
    loop: Callable[[nn.Module], dict[str, Tensor | None]],
    error: float = 1e-11,
    make: Callable[[], EvoformerStack] = new_stack,
    **problem,
) -> None:
    """The same loop on a plain model and on a planned one: the same gradients."""
    assert_same(loop(make()), loop(planned(make(), mode, **problem)), error)
