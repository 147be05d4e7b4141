"""A plan for a model in hand and inputs like those it will be given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from evoplan.cost_model.loss import Loss
from evoplan.model.running.chain import Plannable
from evoplan.planner.arguments import check_choices, check_kinds
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.device_file import one_line, own_device
from evoplan.planner.problems.problem import AUTOCAST, MEAN_SQUARE, Given, Mixed, Mode, Optimizer, Problem
from evoplan.planner.problems.timing import Times, cost_with_times
from evoplan.planner.sizes import parse_size
from evoplan.planner.solvers import solver as solver_of


def make_plan(
    stack: Plannable,
    inputs: Mapping[str, Tensor | None] | Iterable[Tensor | None],
    budget: str | int | None = None,
    *,
    device: str = "cpu",
    mode: Mode = "training",
    optimizer: Optimizer = "adamw",
    ranks: int = 1,
    solver: str = "dp",
    times: Times = "auto",
    autocast: torch.dtype | None = None,
    loss: Loss | None = None,
    reserve: str | int = 0,
    host_memory: str | int | None = None,
    donate: bool = False,
) -> Plan:
    """Plan a model for inputs like these.

    Args:
        stack: an EvoformerStack, EvoformerTrunk, PairformerStack, MSAModuleStack or TinyOpenFoldStack.
        inputs: what forward takes, by name or in its order: the state, such as m [b, s, r, c_m] and
            z [b, r, r, c_z], and masks if they will be given; only shapes, dtypes and strides count.
        budget: such as "16GiB", or bytes: for the whole device; None is unlimited.
        device: by its name in the device table, or its file; cuda is this machine's GPU.
        mode: training, or inference, in which nothing is kept for a backward.
        optimizer: whose states count: none, sgd (with momentum) or adamw.
        ranks: devices that share each input; the plan is for one of them.
        solver: by name: dp, cp-sat, none, small, large, sqrt or seed-dp.
        times: where step times come from: measured, calibrated or roofline; auto is the best there is.
        autocast: torch.bfloat16 or torch.float16, where forward runs under torch.autocast to that dtype.
        loss: takes what forward returns and returns a scalar; it is traced, and the plan's peak holds for it.
            Without it the peak holds for `model.programs.loss.mean_square`: it makes its gradient alone.
        reserve: of the budget, kept free for what is not in the plan: a head, a loss that is not given.
        host_memory: such as "64GiB", or bytes, in which what training keeps may wait for backward, of a
            device apart from the host.
        donate: in inference, let a step have the state that it is given: it writes over it and lets go of it,
            and the caller's tensors are empty as soon as the model is called. Masks stay the caller's.

    Raises:
        NoPlanError: nothing fits; its `least_feasible_bytes` is the least budget that has a plan.
        ValueError: inputs, budget or a name that make no sense.
    """
    _check(stack, inputs, device, mode, optimizer, times, loss)
    solver_of(solver)  # a wrong name is said before the work
    tensors = stack.arguments(**inputs) if isinstance(inputs, Mapping) else stack.arguments(*inputs)
    state = {name: tensors[name] for name in stack.config.state}
    dtype = _name_of(next(iter(state.values())).dtype)
    own = own_device(device)
    with one_line():
        problem = Problem(
            model="custom",
            config=stack.config,
            shape=stack.config.input_shape({name: tuple(tensor.shape) for name, tensor in state.items()}),
            dtype=dtype,
            mode=mode,
            optimizer=optimizer,
            device=own.name if own else device,
            own_device=own,
            ranks=ranks,
            budget_bytes=None if budget is None else parse_size(budget),
            reserve_bytes=parse_size(reserve, least=0),
            host_bytes=None if host_memory is None else parse_size(host_memory),
            mixed=_mixed(autocast),
            loss=MEAN_SQUARE if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__),
            given=tuple(_given(tensors, dtype)),
            donate=donate,
        )
    return solve(cost_with_times(problem, times, stack=stack, loss=loss), solver)


def _mixed(autocast: torch.dtype | None) -> Mixed | None:
    if autocast is None:
        return None
    for mixed, name in AUTOCAST.items():
        if autocast == getattr(torch, name):
            return mixed
    raise ValueError(f"autocast to {autocast}: choose torch.bfloat16 or torch.float16")


def check_stack(stack: Any) -> None:
    """ValueError where it is no model that is planned by itself."""
    check_kinds(stack=(stack, Plannable, "an EvoformerStack, say; models of others go to evoplan.fit"))


def _check(stack: Any, inputs: Any, device: Any, mode: Any, optimizer: Any, times: Any, loss: Any) -> None:
    """ValueError for what `make_plan` is not to be called with."""
    check_stack(stack)
    check_kinds(
        device=(device, str, "its name in the device table, or its file"),
        loss=(loss, Callable | None, "a function that takes what forward returns and returns a scalar"),
    )
    check_choices(mode=(mode, Mode), optimizer=(optimizer, Optimizer), times=(times, Times))
    if isinstance(inputs, Tensor) or not isinstance(inputs, Iterable):
        found = type(inputs).__name__
        raise ValueError(f"inputs are of class {found}; give tensors by name, or a tuple of them")


def _given(tensors: Mapping[str, Tensor], dtype: str) -> Iterator[Given]:
    """Inputs that the model will have to copy, and how they are given."""
    for name, tensor in tensors.items():
        own = _name_of(tensor.dtype)
        if own != dtype or not tensor.is_contiguous():
            stride = None if tensor.is_contiguous() else tensor.stride()
            yield Given(name=name, dtype=None if own == dtype else own, stride=stride)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
