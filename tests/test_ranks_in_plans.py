"""Plans for several ranks: one rank's costs, every rank's peak, and what the ranks send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import group

from evoplan.cost_model.devices import Link, device
from evoplan.cost_model.roofline import reduction_seconds, seconds
from evoplan.cost_model.trace import Work
from evoplan.model import EvoformerStack, InputShape
from evoplan.model.families import TrunkConfig
from evoplan.model.sharing.ranks import Ranks
from evoplan.planner import NoPlanError, apply_plan, simulate_plan, verify_plan
from evoplan.planner.plans.certify import certify
from evoplan.planner.plans.plan import Plan, load_plan
from evoplan.planner.plans.planning import solve, solve_for_fewest_ranks
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Problem
from tests.conftest import TINY, TINY_EXTRA
from tests.ranks import on_ranks
from tests.test_verify import CONFIG

TRUNK = TrunkConfig(replace(TINY_EXTRA, n_block=1, c_m=6), replace(TINY, n_block=1))


def problem(ranks: int, budget: int | None = None, **changes) -> Problem:
    shape = InputShape(11, 14, n_extra=17 if "config" in changes else None)
    asked = {"model": "custom", "config": TINY, "shape": shape, "device": "a100-40gb"}
    return Problem(**asked | changes, ranks=ranks, budget_bytes=budget)


_MORE = [pytest.param(changes, marks=pytest.mark.slow) for changes in ({"config": TRUNK}, {"device": "cpu"})]


@pytest.mark.parametrize("changes", [{}, {"mode": "inference"}, *_MORE])
def test_every_ranks_peak_is_predicted(changes: dict, tmp_path) -> None:
    """3 ranks share 11 rows and 14 columns: no two of them hold the same."""
    costed = cost_problem(problem(3, **changes))
    most = solve(costed).predicted.peak_bytes
    ask = costed.problem.model_copy(update={"budget_bytes": most - (most - costed.fixed_bytes) // 3})
    plan = solve(replace(costed, problem=ask))
    plan.save(tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    assert plan.predicted.peak_bytes == max(plan.rank_peak_bytes)
    assert plan.rank_peak_bytes[2] < plan.rank_peak_bytes[0]
    for rank, predicted in enumerate(plan.rank_peak_bytes):
        found = simulate_plan(plan, rank)
        assert found.predicted_peak_bytes == predicted
        # A shard of m has 4 x 14 or 11 x 5 positions, and the larger is counted in either layout.
        assert found.measured_peak_bytes == pytest.approx(predicted, rel=3e-3)


def test_ranks_need_less_memory_and_send_what_they_share() -> None:
    alone, shared = (cost_problem(problem(ranks)) for ranks in (1, 2))
    assert solve(shared).predicted.activation_bytes < solve(alone).predicted.activation_bytes
    sent = [
        sum(option.forward_work.sent_bytes + option.backward_work.sent_bytes for option in options[:1])
        for options in shared.table.options
    ]
    names = [step.name.split(".")[-1] for step in _steps(shared)]
    by_name = dict(zip(names, sent, strict=True))
    # A column of m's reshard: a rank sends half of its 6 x 14 positions; in backward half of 11 x 7.
    assert by_name["reshard_m_for_column_attention"] == 4 * TINY.c_m * (6 * 7 + 5 * 7)
    assert by_name["triangle_outgoing"] > 0
    assert by_name["msa_transition"] == 0
    assert not any(option.forward_work.sent_bytes for options in alone.table.options for option in options)


def _steps(costed):
    from evoplan.model import Chain

    return Chain.of(costed.model).steps


def test_a_slower_link_costs_time_and_not_memory() -> None:
    fast, slow = (cost_problem(problem(2, link=link)) for link in (Link(1e12, 0), Link(1e6, 1e-3)))
    fast, slow = solve(fast).predicted, solve(slow).predicted
    assert slow.step_seconds > 2 * fast.step_seconds
    assert slow.peak_bytes == fast.peak_bytes


def test_a_certificate_counts_what_every_schedule_sends() -> None:
    """Summing gradients over a slow link takes longest here, and is no gap."""
    costed = cost_problem(problem(2, link=Link(1e5, 1e-3)))
    plan = certify(costed, solve(costed))
    assert costed.reduction_seconds > 0.1 * plan.predicted.step_seconds
    assert plan.solver.gap == pytest.approx(0, abs=1e-6)


def test_times_of_collectives() -> None:
    work = Work(collectives=Counter({(1000, 3): 2}))
    launch = device("a100-40gb").launch_seconds
    took = seconds(work, device("a100-40gb"), "float32", Link(1e3, 0.5))
    assert took == pytest.approx(2 * (launch + 3 * 0.5 + 1.0))
    assert reduction_seconds(1000, 1, Link(1e3, 0.5)) == 0
    assert reduction_seconds(1000, 4, Link(1e3, 0.5)) == pytest.approx(6 * 0.5 + 1.5)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Costed]:
    """Costs answer to no budget: each problem's are traced once."""
    known: dict[str, Costed] = {}

    def once(asked: Problem, *arguments, **named) -> Costed:
        key = asked.model_copy(update={"budget_bytes": None}).model_dump_json()
        if key not in known:
            known[key] = cost_problem(asked, *arguments, **named)
        return replace(known[key], problem=asked)

    monkeypatch.setattr("evoplan.planner.problems.timing.cost_problem", once)
    return once


def test_as_few_ranks_as_the_budget_needs(costs: Callable[..., Costed]) -> None:
    assert solve_for_fewest_ranks(problem(1, 10**9, optimizer="none"))[1].problem.ranks == 1
    least = {}
    for ranks in (1, 2, 4):
        with pytest.raises(NoPlanError) as error:
            solve(costs(problem(ranks, 1, optimizer="none")))
        least[ranks] = error.value.least_feasible_bytes
    assert least[4] < least[2] < least[1]
    for ranks, budget in least.items():
        assert solve_for_fewest_ranks(problem(1, budget, optimizer="none"))[1].problem.ranks == ranks
    with pytest.raises(NoPlanError, match="8 ranks are too few"):
        solve_for_fewest_ranks(problem(1, 1, optimizer="none"))


def test_a_plan_for_ranks_needs_them() -> None:
    plan = solve(cost_problem(problem(2, dtype="float32")))
    with pytest.raises(ValueError, match="for 2 ranks; give their process group"):
        apply_plan(EvoformerStack(TINY), plan)
    with pytest.raises(ValueError, match="for 2 ranks, not 3"):
        apply_plan(EvoformerStack(TINY), plan, Ranks(None, 0, 3))


def _with_budget(costed: Costed, budget: int) -> Costed:
    return replace(costed, problem=costed.problem.model_copy(update={"budget_bytes": budget}))


def tight_plan(asked: Problem) -> Plan:
    """For a budget not far above the least."""
    costed = cost_problem(asked)
    most = solve(costed).predicted.peak_bytes
    with pytest.raises(NoPlanError) as error:
        solve(_with_budget(costed, 1))
    return solve(_with_budget(costed, (error.value.least_feasible_bytes * 2 + most) // 3))


def verified(plans: list[str]) -> list[dict]:
    """Plans run for real on this rank."""
    ranks = Ranks(group.WORLD)
    return [verify_plan(None, load_plan(plan), repeats=1, ranks=ranks).to_json() for plan in plans]


@pytest.mark.parametrize("config", [CONFIG, TRUNK], ids=["stack", "trunk"])
def test_ranks_keep_a_plans_promise(config, tmp_path) -> None:
    """Measured on 2 processes, against one without a plan; the sizes do not divide."""
    shape = InputShape(7, 11, n_extra=9 if config is TRUNK else None)
    asked = Problem(model="custom", config=config, shape=shape, dtype="float64", ranks=2)
    paths = [str(tmp_path / mode) for mode in ("training", "inference")]
    for path in paths:
        tight_plan(asked.model_copy(update={"mode": Path(path).name})).save(path)
    for rank, by_mode in enumerate(on_ranks(2, verified, paths)):
        for found in by_mode:
            print(rank, found)
            assert found["ok"]
            assert found["max_loss_error"] < 1e-11
            assert (found["max_gradient_error"] or 0) < 1e-11
            activations = found["predicted_peak_bytes"] - found["static_bytes"]
            assert found["measured_peak_bytes"] == pytest.approx(
                found["predicted_peak_bytes"], abs=0.03 * activations
            )


@pytest.mark.parametrize("ranks", [4, 5])
def test_the_budget_holds_on_every_rank(ranks: int) -> None:
    """Here a rank with shorter shards needs a block more than the first one."""
    asked = problem(ranks, 1, shape=InputShape(8, 7), dtype="float16", mode="inference")
    costed = cost_problem(asked)
    with pytest.raises(NoPlanError) as error:
        solve(costed)
    least = error.value.least_feasible_bytes
    plan = solve(replace(costed, problem=asked.model_copy(update={"budget_bytes": least})))
    assert max(plan.rank_peak_bytes) == plan.predicted.peak_bytes <= least
    assert all(simulate_plan(plan, rank).ok for rank in range(ranks))
    with pytest.raises(NoPlanError, match=rf"the least that does is .*\({least:,} bytes\)"):
        solve(replace(costed, problem=asked.model_copy(update={"budget_bytes": least - 1})))
