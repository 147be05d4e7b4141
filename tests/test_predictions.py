"""What a plan file predicts is what a replay of its schedule finds, whatever somebody has written into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import evoplan
from evoplan.planner.checking.consistency import load_consistent
from evoplan.planner.checking.predictions import check_predicted
from evoplan.planner.commands.cli import main
from evoplan.planner.fitting.plan import FitPlan, load_fit_plan
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.plans.sealed import PlanFileError
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.solvers.offload_frontier import OffloadFrontier
from tests.offload import CONFIG, asked
from tests.zoo import case


@pytest.fixture(scope="module")
def plan() -> Plan:
    """One of which something waits in host memory."""
    costed = cost_problem(asked(config=replace(CONFIG, n_block=4)))
    least = OffloadFrontier(costed.table, 2**30).least_replay.peak_bytes + costed.fixed_bytes
    found = solve(replace(costed, problem=costed.problem.model_copy(update={"budget_bytes": least})))
    assert found.predicted.host_bytes > 0
    return found


def _with(plan: Any, name: str, **update: Any) -> Any:
    return plan.model_copy(update={name: getattr(plan, name).model_copy(update=update)})


def _peaking(plan: Plan, more: int) -> Plan:
    """The plan with another peak, which adds up."""
    said = plan.predicted
    peak = said.peak_bytes + more
    update = {"peak_bytes": peak, "activation_bytes": said.activation_bytes + more}
    return _with(plan, "predicted", **update).model_copy(update={"rank_peak_bytes": (peak,)})


def _altered(plan: Plan, figure: str) -> Plan:
    said = plan.predicted
    none = plan.baselines["none"]
    if figure == "predicted.host_bytes":
        return _with(plan, "predicted", host_bytes=said.host_bytes - 512)
    if figure == "predicted.step_seconds":
        return _with(plan, "predicted", step_seconds=said.step_seconds * 1.001)
    if figure == "predicted.peak_bytes":
        return _peaking(plan, -512)
    if figure == "static.inputs":
        static = plan.static | {"inputs": plan.static["inputs"] + 512}
        update = {"static_bytes": said.static_bytes + 512, "activation_bytes": said.activation_bytes - 512}
        return _with(plan, "predicted", **update).model_copy(update={"static": static})
    assert figure == "baselines.none.step_seconds"
    faster = none.model_copy(update={"step_seconds": none.step_seconds / 2})
    return plan.model_copy(update={"baselines": plan.baselines | {"none": faster}})


FIGURES = ("predicted.host_bytes", "predicted.step_seconds", "predicted.peak_bytes", "static.inputs")


@pytest.mark.parametrize("figure", [*FIGURES, "baselines.none.step_seconds"])
def test_a_figure_that_the_schedule_does_not_have_is_refused(plan: Plan, figure: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert load_consistent(str(path)) == plan
    _altered(plan, figure).save(path)  # with a digest of its own
    says = rf"^{path}: {figure} is \d[^\n]+, and what its schedule takes is \d[^\n]+; make it again$"
    with pytest.raises(PlanFileError, match=says):
        load_consistent(str(path))


@pytest.mark.parametrize("command", [("show",), ("verify",), ("verify", "--simulate"), ("run",)])
@pytest.mark.parametrize("figure", ["predicted.host_bytes", "predicted.step_seconds"])
def test_commands_refuse_it_in_one_line(
    plan: Plan, figure: str, command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    _altered(plan, figure).save(path)
    name, *flags = command
    with pytest.raises(SystemExit) as stopped:
        main([name, str(path), *flags])
    out, said = capsys.readouterr()
    assert stopped.value.code == 2
    assert not out
    assert said.startswith(f"evoplan: {path}: {figure} is ")
    assert said.count("\n") == 1


def test_what_cannot_be_found_here_is_not_asked_for(plan: Plan) -> None:
    """Times that were measured, peaks that another torch traced, and scratch of another processor."""
    slower = _altered(plan, "predicted.step_seconds")
    check_predicted(slower.model_copy(update={"costs": plan.costs | {"time": "measured"}}))
    with pytest.raises(ValueError, match=r"predicted\.peak_bytes"):
        check_predicted(_peaking(plan, -512).model_copy(update={"costs": plan.costs | {"time": "measured"}}))
    check_predicted(_peaking(plan, -512).model_copy(update={"costs": plan.costs | {"torch": "2.0.0"}}))
    own_loss = _with(_peaking(plan, 10**6), "problem", loss="mine")
    check_predicted(own_loss)
    with pytest.raises(ValueError, match=r"predicted\.peak_bytes"):
        check_predicted(_with(_peaking(plan, -512), "problem", loss="mine"))
    on_cpu = solve(cost_problem(asked(device="cpu", host_bytes=None)))
    check_predicted(_peaking(on_cpu, 4096))
    for more in (on_cpu.predicted.peak_bytes // 20, -on_cpu.predicted.peak_bytes // 20):
        with pytest.raises(ValueError, match=r"predicted\.peak_bytes"):
            check_predicted(_peaking(on_cpu, more))


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_ranks_peak_is_checked(ranks: int) -> None:
    found = solve(cost_problem(asked(ranks=ranks, host_bytes=None)))
    check_predicted(found)
    assert len(found.rank_peak_bytes) == ranks
    least = found.rank_peak_bytes.index(min(found.rank_peak_bytes))
    less = tuple(peak - 512 * (rank == least) for rank, peak in enumerate(found.rank_peak_bytes))
    with pytest.raises(ValueError, match=r"predicted\.peak_bytes"):
        check_predicted(found.model_copy(update={"rank_peak_bytes": less}))


def test_a_fitted_plans_figures_are_its_models(tmp_path: Path) -> None:
    given, path = case("gpt"), tmp_path / "plan.json"
    fitted = given.fit(10**7)
    plan: FitPlan = fitted.plan
    fitted.remove()
    given.fit(plan=plan).remove()
    said = plan.predicted
    with pytest.raises(evoplan.CaptureError, match=r"^the plan's step takes [^\n]+; fit anew$"):
        given.fit(plan=_with(plan, "predicted", step_seconds=said.step_seconds * 1.01))
    other = {"static_bytes": said.static_bytes - 8, "activation_bytes": said.activation_bytes + 8}
    static = plan.static | {"inputs": plan.static["inputs"] - 8}
    with pytest.raises(evoplan.CaptureError, match=r"^the plan's static bytes [^\n]+; fit anew$"):
        given.fit(plan=_with(plan, "predicted", **other).model_copy(update={"static": static}))
    _with(plan, "predicted", host_bytes=1).save(path)
    with pytest.raises(PlanFileError, match="which blocks of a fitted model cannot"):
        load_fit_plan(path)
