"""Planned models under what watches a run: counters of FLOPs, trackers of modules, selective checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mod_tracker import ModTracker
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from evoplan import EvoformerStack, apply_plan, make_plan
from evoplan.cost_model.costs import build_cost_table
from evoplan.cost_model.devices import device
from evoplan.model.running.strategy import COMPILED
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from tests.conftest import TINY
from tests.loops import MODES, assert_same, gradients, inputs, new_stack, planned, step
from tests.zoo import CASES, Case, case


class Products(TorchDispatchMode):
    """FLOPs of every operator that torch knows them of, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.flops += 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(autouse=True)
def _nothing_is_said() -> Any:
    """Above all not that a layer has hooks, and that the plan is run otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def check_counts(run: Callable[[], dict[str, Tensor | None]]) -> FlopCounterMode:
    """The counter sees what runs, all of it, and changes nothing."""
    expected = run()
    with Products() as products:
        run()
    with FlopCounterMode(display=False) as counter:
        got = run()
    assert_same(expected, got)  # layers are called, which rounds otherwise
    assert counter.get_total_flops() == products.flops > 0
    return counter


def own_step(model: nn.Module, **leaves: Tensor) -> dict[str, Tensor | None]:
    for tensor in (*model.parameters(), *leaves.values()):
        tensor.grad = None
    step(model, inputs() | leaves)
    return gradients(model, **leaves)


def schedules(table: Any) -> list[Sequence]:
    """Each strategy of every step, recorded at once and in a checkpoint around all."""
    offered = [[c.strategy for c in costs if c.strategy.kernel != COMPILED] for costs in table.options]
    found = []
    for number in range(max(map(len, offered))):
        chosen = tuple(some[min(number, len(some) - 1)] for some in offered)
        body = Sequence(tuple(Run(at, strategy) for at, strategy in enumerate(chosen)))
        found += [body, Sequence((Checkpoint(body, chosen),))]
    return found


@pytest.mark.parametrize("leaf", [True, False])
def test_flops_of_every_strategy_are_counted(leaf: bool) -> None:
    stack = new_stack(replace(TINY, n_block=1))
    shapes = {name: tuple(x.shape) for name, x in inputs().items() if name in ("m", "z")}
    given = {name: x.requires_grad_(leaf) for name, x in inputs().items() if name in ("m", "z")}
    table = build_cost_table(stack, shapes, "float64", device("cpu"))
    for schedule in schedules(table)[leaf::2]:  # at once; again
        model = PlannedModule(stack, schedule)
        counter = check_counts(partial(own_step, model, **given))
        named = counter.flop_counts
        assert sum(named["PlannedModule.blocks.0"].values()) > 0
        assert sum(named["PlannedModule.blocks.0.triangle_starting"].values()) > 0


def test_a_tight_plan_counts_what_runs_again() -> None:
    counts = [check_counts(partial(own_step, planned(new_stack(), mode))) for mode in ("roomy", "tight")]
    plain = check_counts(partial(own_step, new_stack())).get_total_flops()
    roomy, tight = (counter.get_total_flops() for counter in counts)
    assert plain == roomy < tight < 2 * plain


@pytest.mark.parametrize("name", CASES)
def test_flops_of_fitted_models_are_counted(name: str) -> None:
    given = case(name)
    under = given.fit()
    fitting, plan = under._fitting, under.plan
    under.remove()
    every = schedules(fitting.table)
    for schedule in (*every[:3], *every[-2:]):
        about = {"schedule": schedule, "predicted": fitting.predict(schedule)}
        fitted = given.fit(plan=plan.model_copy(update=about))
        check_counts(partial(_fitted_step, given))
        fitted.remove()


def _fitted_step(given: Case) -> dict[str, Tensor | None]:
    given.model.zero_grad()
    torch.manual_seed(0)
    made = pytree.tree_leaves(given.model(*given.args, **given.kwargs))
    sum(x.square().mean() for x in made if isinstance(x, Tensor) and x.requires_grad).backward()
    return gradients(given.model)


def noting_inputs(modules: list[str], module: nn.Module, given: tuple[Any, ...]) -> None:
    wanted = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
    if wanted:
        torch.autograd.graph.register_multi_grad_hook(wanted, lambda _: modules.append(type(module).__name__))


@pytest.mark.parametrize("mode", MODES)
def test_trackers_of_modules_change_nothing(mode: str) -> None:
    model = planned(new_stack(), mode)
    expected = own_step(model)
    with ModTracker():
        assert_same(expected, own_step(model))


@pytest.mark.filterwarnings("ignore:.*has hooks or was replaced")
@pytest.mark.parametrize("mode", MODES)
def test_hooks_for_several_tensors_on_every_module(mode: str) -> None:
    modules: list[str] = []
    model = planned(new_stack(), mode)
    expected = own_step(model)
    handle = register_module_forward_pre_hook(partial(noting_inputs, modules))
    try:
        assert_same(expected, own_step(model))
    finally:
        handle.remove()
    assert {"LayerNorm", "Linear"} <= set(modules)


def save_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> bool:
    return operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def around(model: nn.Module, *tensors: Tensor, **about: Any) -> Any:
    return checkpoint(model, *tensors, use_reentrant=False, **about)


@pytest.mark.parametrize("mode", MODES)
def test_a_selective_checkpoint_around_a_plan_is_refused(mode: str) -> None:
    """torch has what it has kept given back once, and a plan's backward is one of every step's."""
    model = planned(new_stack(), mode).eval()
    given = [x.requires_grad_() for name, x in inputs().items() if name in ("m", "z")]
    selective = partial(create_selective_checkpoint_contexts, save_products)
    with pytest.raises(
        ValueError, match=r"^the planned model is called inside a selective.*call it outside: "
    ):
        around(model, *given, context_fn=selective)
    with torch.no_grad():
        around(model, *given, context_fn=selective)
    expected = _checkpointed_step(model, given, model)
    assert_same(expected, _checkpointed_step(model, given, partial(around, model)))


def _checkpointed_step(model: nn.Module, given: list[Tensor], run: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    sum(x.square().mean() for x in run(*given)).backward()
    return gradients(model)


def test_inference_in_pieces_goes_on_in_place_where_flops_are_counted() -> None:
    stack = EvoformerStack(TINY).double().eval()
    given = [x for name, x in inputs().items() if name in ("m", "z")]
    plan = make_plan(stack, given, mode="inference", times="roofline")
    with torch.no_grad():
        expected = stack(*given)
        with FlopCounterMode(display=False):
            got = apply_plan(stack, plan)(*given)
    assert all(torch.allclose(a, b, rtol=1e-11) for a, b in zip(expected, got, strict=True))
