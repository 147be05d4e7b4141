"""What a plan would cost if a submodule ran another way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evoplan.cost_model.times import Measured
from evoplan.model import EvoformerConfig, EvoformerStack, InputShape
from evoplan.model.running.kernels import is_opaque
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.plans.alternatives import alternatives, with_strategy
from evoplan.planner.plans.plan import SolverReport, load_plan
from evoplan.planner.plans.planning import plan_of, solve
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import cost_with_times
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, all_runs, final_strategies
from evoplan.planner.solvers import BASELINES
from tests.test_times import cache, run  # noqa: F401  (a fixture)

CONFIG = EvoformerConfig(n_block=2, c_m=16, c_z=16, n_head_msa=2, n_head_pair=2, c_head=8, c_opm=4, c_tri=16)
PROBLEM = Problem(model="custom", config=CONFIG, shape=InputShape(6, 9), budget_bytes=10**9)


def test_a_step_changes_in_every_pass_and_no_other_does() -> None:
    chunk = Strategy("chunk", "row", 2)
    body = Sequence((Run(1, WHOLE), Checkpoint(Sequence((Run(2, chunk),)), (WHOLE,))))
    schedule = Sequence((Run(0, WHOLE), Checkpoint(body, (WHOLE, chunk))))
    changed = with_strategy(schedule, frozenset({2}), LEAN)
    assert final_strategies(changed) == {0: WHOLE, 1: WHOLE, 2: LEAN}
    assert [run.strategy for run in all_runs(changed)] == [WHOLE, WHOLE, LEAN]
    assert with_strategy(changed, frozenset({9}), chunk) == changed


def test_what_the_plan_does_costs_nothing_more() -> None:
    costed = cost_problem(PROBLEM)
    none = plan_of(costed, BASELINES["none"](costed.table), SolverReport(name="none", seconds=0.0))
    found = alternatives(none, costed)
    assert len(found) == sum(len(options) for options in costed.table.options[:9])
    for row in found:
        if row.strategy == "whole":
            assert (row.more_bytes, row.more_seconds) == (0, 0)
    # The fastest plan has nothing to gain.
    best = solve(costed)
    assert all(row.more_seconds >= -1e-12 for row in alternatives(best, costed))


def test_what_does_not_fit_is_said() -> None:
    costed = cost_problem(PROBLEM)
    tight = plan_of(costed, BASELINES["small"](costed.table), SolverReport(name="small", seconds=0.0))
    problem = PROBLEM.model_copy(update={"budget_bytes": tight.predicted.peak_bytes})
    found = alternatives(tight.model_copy(update={"problem": problem}), costed)
    assert all(row.fits == (row.more_bytes <= 0) for row in found)
    assert {row.fits for row in found} == {True, False}


def test_show_prints_them_with_the_plans_own_times(
    cache: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out, result = tmp_path / "plan.json", tmp_path / "show.json"
    costed = cost_with_times(PROBLEM, "measured", cache)
    none = plan_of(costed, BASELINES["none"](costed.table), SolverReport(name="none", seconds=0.0))
    none.save(out)
    assert load_plan(out).costs["time"] == Measured.name
    code, printed = run(["show", str(out), "--cache", cache, "--json", str(result)], capsys)
    assert code == 0, printed
    assert "had a submodule run another way" in printed
    document = json.loads(result.read_text())
    assert document["times"] == "measured"
    assert {"submodule", "strategy", "more_seconds", "more_bytes", "fits"} <= set(document["alternatives"][0])
    # Where those times are not, it says so.
    code, printed = run(["show", str(out), "--cache", str(tmp_path / "none.sqlite")], capsys)
    assert code == 0, printed
    assert "no measured times here: times below are of the roofline" in printed
    # A kernel whose memory is known only where it was measured: the plan is shown, what is missing is said.
    step, opaque = next(
        (step, cost.strategy)
        for step, options in enumerate(costed.table.options)
        for cost in options
        if is_opaque(cost.strategy)
    )
    fused = with_strategy(none.schedule, frozenset({step}), opaque)
    plan_of(costed, fused, SolverReport(name="none", seconds=0.0)).save(out)
    code, printed = run(
        ["show", str(out), "--cache", str(tmp_path / "none.sqlite"), "--json", str(result)], capsys
    )
    assert code == 0, printed
    assert f"the plan runs {opaque.kernel}, of which nothing is known here" in printed
    assert set(json.loads(result.read_text())) == {"plan"}


def test_a_step_without_an_axis_is_named() -> None:
    """It can be kept, leaner or not, or run again; the plan says which steps are so."""
    stack = EvoformerStack(CONFIG)
    for block in stack.blocks:
        block.msa_transition.axes = ()
    costed = cost_problem(PROBLEM, stack)
    assert solve(costed).only_whole == ("msa_transition",)
    assert solve(cost_problem(PROBLEM)).only_whole == ()
