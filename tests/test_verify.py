"""Plans applied for real, on small models: what was predicted is what the allocator sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from evoplan.model import EvoformerConfig, EvoformerStack, InputShape
from evoplan.model.running.dropout import dropout_mask
from evoplan.planner import NoPlanError, apply_plan, make_plan, simulate_plan, verify_plan
from evoplan.planner.checking.verify import Verification
from evoplan.planner.execution.submodules import SubmoduleRuns
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.reports.checks import print_verification
from evoplan.planner.solvers import Frontier

CONFIG = EvoformerConfig(2, 24, 20, 4, 2, 8, 8, 16, 2, c_head_msa=8)


SHARES = [0.0, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.3, 0.6)), 1.0]


@pytest.fixture(scope="module", params=["gated", "global"])
def costed(request: pytest.FixtureRequest) -> Costed:
    config = replace(CONFIG, column_attention=request.param)
    return cost_problem(Problem(model="custom", config=config, shape=InputShape(9, 17), dtype="float64"))


def at(costed: Costed, share: float):
    """A plan for a budget that lies at `share` between the least and the largest of any use."""
    frontier = Frontier(costed.table)
    budgets = frontier.budgets(9)
    budget = costed.fixed_bytes + budgets[round(share * (len(budgets) - 1))]
    problem = costed.problem.model_copy(update={"budget_bytes": budget})
    return solve(replace(costed, problem=problem))


@pytest.mark.parametrize("share", SHARES)
def test_plans_keep_their_promise(costed: Costed, share: float) -> None:
    plan = at(costed, share)
    found = verify_plan(None, plan, repeats=1)
    assert found.ok
    assert found.max_gradient_error < 1e-12
    predicted = found.predicted_peak_bytes - found.static_bytes
    measured = found.measured_peak_bytes - found.static_bytes
    assert 0.98 * predicted <= measured <= predicted
    simulated = simulate_plan(plan)
    assert abs(simulated.measured_peak_bytes - found.predicted_peak_bytes) <= 0.01 * predicted


def changed(plan: Plan, peak: int, budget: int | None = None) -> Plan:
    """The plan with another prediction of its peak, and another budget."""
    predicted = plan.predicted.model_copy(update={"peak_bytes": peak})
    problem = plan.problem.model_copy(update={"budget_bytes": budget})
    return plan.model_copy(update={"predicted": predicted, "problem": problem, "rank_peak_bytes": (peak,)})


def measured(plan: Plan) -> Verification:
    return verify_plan(None, plan, repeats=1, unplanned=False)


def test_what_ranks_are_compared_with_is_said() -> None:
    found = Verification(
        "cpu-allocator",
        None,
        100,
        100,
        10,
        1.0,
        1.0,
        300,
        1.0,
        0.0,
        0.0,
        None,
        {"loss": 1, "gradient": 1},
        True,
    )
    texts = []
    for ranks in (1, 2):
        console = Console(width=80, record=True)
        print_verification(found, console, ranks)
        texts.append(" ".join(console.export_text().split()))
    assert "whole" not in texts[0]
    assert "compared with the whole model, run without a plan on one process" in texts[1]


@pytest.mark.parametrize("judge", [simulate_plan, measured])
def test_what_is_no_success(judge: Callable[[Plan], Verification]) -> None:
    """A measured peak above the budget, be it by a byte, and a prediction that is off either way."""
    config = replace(CONFIG, n_block=1)
    plan = solve(
        cost_problem(Problem(model="custom", config=config, shape=InputShape(3, 4), dtype="float64"))
    )
    peak = judge(plan).measured_peak_bytes
    assert judge(changed(plan, peak, peak)).ok
    assert not judge(changed(plan, peak - 1, peak - 1)).ok
    for share, ok in ((0.97, False), (0.99, True), (1.01, True), (1.03, False)):
        assert judge(changed(plan, int(share * peak))).ok == ok, share


def test_inference(costed: Costed) -> None:
    problem = costed.problem.model_copy(update={"mode": "inference"})
    whole = solve(cost_problem(problem))
    tight = problem.model_copy(update={"budget_bytes": int(whole.predicted.peak_bytes * 0.75)})
    plan = solve(cost_problem(tight))
    found = verify_plan(None, plan, repeats=1)
    assert found.ok
    assert found.measured_peak_bytes <= tight.budget_bytes
    assert found.max_loss_error < 1e-12


def test_least_feasible_is_feasible_and_one_byte_less_is_not(costed: Costed) -> None:
    with pytest.raises(NoPlanError) as caught:
        solve(replace(costed, problem=costed.problem.model_copy(update={"budget_bytes": 1})))  # fmt: skip
    least = caught.value.least_feasible_bytes
    for budget, fits in ((least, True), (least - 1, False)):
        problem = costed.problem.model_copy(update={"budget_bytes": budget})
        ask = replace(costed, problem=problem)
        if fits:
            assert solve(ask).predicted.peak_bytes <= budget
        else:
            with pytest.raises(NoPlanError):
                solve(ask)


def test_more_budget_is_never_slower(costed: Costed) -> None:
    frontier = Frontier(costed.table)
    seconds = [frontier.seconds(budget) for budget in frontier.budgets(200)]
    assert all(a >= b for a, b in itertools.pairwise(seconds))
    assert seconds[-1] < seconds[0] < float("inf")


def test_python_interface() -> None:
    stack = EvoformerStack(CONFIG)
    m, z = torch.randn(1, 9, 17, 24), torch.randn(1, 17, 17, 20)
    plan = make_plan(stack, (m, z), budget="8MiB")
    planned = apply_plan(stack, plan)
    assert {id(p) for p in planned.parameters()} == {id(p) for p in stack.parameters()}
    torch.testing.assert_close(planned(m, z, dropout_seed=1), stack(m, z, dropout_seed=1))
    with pytest.raises(ValueError, match="the plan is for"):
        apply_plan(EvoformerStack(EvoformerConfig(1, 24, 20)), plan)
    with pytest.raises(ValueError, match="float32"):
        apply_plan(EvoformerStack(CONFIG).double(), plan)
    with pytest.raises(ValueError, match=r"z is .* need"):
        make_plan(stack, (m, z[:, 1:]))


def test_half_precision_is_judged_by_what_is_right() -> None:
    """Chunks add up a normalisation's bias gradient better than a whole run in bfloat16 does."""
    config = EvoformerConfig(
        n_block=1, c_m=16, c_z=16, n_head_msa=2, n_head_pair=2, c_head=8, c_opm=4, c_tri=16
    )
    problem = Problem(
        model="custom",
        config=config.with_dropout(0.2),
        shape=InputShape(6, 64),
        dtype="bfloat16",
        optimizer="none",
    )
    costed = cost_problem(problem)
    with pytest.raises(NoPlanError) as error:
        solve(replace(costed, problem=problem.model_copy(update={"budget_bytes": 1})))
    least = problem.model_copy(update={"budget_bytes": error.value.least_feasible_bytes})
    found = verify_plan(None, solve(replace(costed, problem=least)), repeats=1)
    assert found.max_gradient_error > found.tolerances["gradient"]
    assert found.gradient_error_beyond_rounding < 0.02
    assert found.ok


def test_masks_do_not_depend_on_the_dtype() -> None:
    submodule = next(EvoformerStack(CONFIG).train().blocks[0].submodules())[1]
    submodule.dropout = 0.3
    dtypes = torch.float32, torch.bfloat16
    masks = [dropout_mask(submodule, torch.empty(4, 6, 5, dtype=dtype), 7, 1) for dtype in dtypes]
    assert torch.equal(masks[0] == 0, masks[1] == 0)
    assert 0 < (masks[0] == 0).sum() < masks[0].numel()


@pytest.mark.parametrize(("dtype", "factor", "ok"), [
    ("float64", 1 + 1e-12, True), ("float64", 1 + 1e-9, False),
    ("float32", 1 + 1e-6, True), ("float32", 1.001, False),
    ("bfloat16", 1.2, False),
])  # fmt: skip
def test_gradients_are_compared(monkeypatch: pytest.MonkeyPatch, dtype: str, factor: float, ok: bool) -> None:
    problem = Problem(model="custom", config=replace(CONFIG, n_block=1), shape=InputShape(3, 4), dtype=dtype)
    vjp = SubmoduleRuns.vjp

    def wrong(runs, step, kept, grads, keep):
        found = vjp(runs, step, kept, grads, keep)
        of_state = len(step.reads)
        return *found[:of_state], *(g.mul_(factor) for g in found[of_state:])  # in no more memory

    monkeypatch.setattr(SubmoduleRuns, "vjp", wrong)
    assert verify_plan(None, solve(cost_problem(problem), "small"), repeats=1).ok == ok


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_nan_is_no_gradient(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """In one gradient, and not the first: max() passes over it."""
    problem = Problem(model="custom", config=replace(CONFIG, n_block=1), shape=InputShape(3, 4), dtype=dtype)
    vjp = SubmoduleRuns.vjp

    def wrong(runs, step, kept, grads, keep):
        found = vjp(runs, step, kept, grads, keep)
        names = [*step.reads, *runs.met[step.index].parameters.trained]
        return tuple(
            g * float("nan") if name == "linear_2.bias" else g for name, g in zip(names, found, strict=True)
        )

    monkeypatch.setattr(SubmoduleRuns, "vjp", wrong)
    found = verify_plan(None, solve(cost_problem(problem), "small"), repeats=1)
    assert found.max_gradient_error == math.inf
    assert not found.ok
