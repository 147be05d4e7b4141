"""Plan files: what is written is read back; what is broken is refused in one line."""

from __future__ import annotations

import json

import pytest

from evoplan.model import EvoformerConfig, InputShape
from evoplan.model.strategy import WHOLE, Strategy
from evoplan.planner.costing import cost_problem
from evoplan.planner.plan import PlanFileError, load_plan, schedule_from_json, schedule_to_json
from evoplan.planner.planning import solve
from evoplan.planner.problem import Problem
from evoplan.planner.schedule import Checkpoint, Run, Sequence, shortened

SMALL = Problem(
    model="custom",
    config=EvoformerConfig(2, 12, 10, 3, 2, 4, 5, 7, 2, c_head_msa=4),
    shape=InputShape(5, 7),
    budget_bytes=400_000,
)


@pytest.fixture(scope="module")
def plan():
    return solve(cost_problem(SMALL))


def test_round_trip(plan, tmp_path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert load_plan(path) == plan
    assert list(tmp_path.iterdir()) == [path]
    document = json.loads(path.read_text())
    predicted = document["predicted"]
    assert predicted["peak_bytes"] == predicted["static_bytes"] + predicted["activation_bytes"]
    assert {"none", "small", "large", "sqrt"} <= set(document["baselines"])
    assert {"name", "seconds", "gap"} <= set(document["solver"])


def _edit(document: dict, how: str) -> str:
    if how == "cut off":
        return json.dumps(document)[:-40]
    if how == "altered":
        document["predicted"]["peak_bytes"] -= 1
    elif how == "schedule altered":
        document["schedule"] = document["schedule"][1:]
    elif how == "other schema":
        document["schema_version"] = 99
    elif how == "not a plan":
        document = {"a": 1}
    elif how == "a list":
        return "[1, 2]"
    elif how == "empty":
        return ""
    return json.dumps(document)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut off", "cut off"),
        ("altered", "altered"),
        ("schedule altered", "altered"),
        ("other schema", "schema 99"),
        ("not a plan", "not a plan"),
        ("a list", "not a plan"),
        ("empty", "cut off"),
    ],
)
def test_broken_files(plan, tmp_path, how: str, says: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(_edit(plan.to_json(), how))
    with pytest.raises(PlanFileError, match=says) as caught:
        load_plan(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_binary(tmp_path) -> None:
    with pytest.raises(PlanFileError, match="cannot be read"):
        load_plan(tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    with pytest.raises(PlanFileError, match="not a plan file"):
        load_plan(tmp_path / "binary.json")


def test_schedules_as_json() -> None:
    chunk = Strategy("chunk", "row", 3)
    inner = Checkpoint(Sequence((Run(1, WHOLE), Run(2, chunk))), (chunk, WHOLE))
    schedule = Sequence((Run(0, WHOLE), Checkpoint(Sequence((inner, Run(3, chunk))), (WHOLE,) * 3)))
    assert schedule_from_json(json.loads(json.dumps(schedule_to_json(schedule)))) == schedule
    for broken in ([[0]], [[0, "halves"]], [{"checkpoint": [], "discard": []}], [[0, "whole"], [2, "whole"]]):
        with pytest.raises(ValueError, match=r"."):
            schedule_from_json(broken)


def test_shortened_keeps_the_choices() -> None:
    body = Sequence(tuple(Run(i, WHOLE) for i in range(1, 5)))
    schedule = Sequence((Run(0, WHOLE), Checkpoint(body, (WHOLE,) * 4), Run(5, WHOLE)))
    cut = shortened(schedule, 3)
    assert cut.span == range(3)
    assert cut.parts[1] == Checkpoint(Sequence((Run(1, WHOLE), Run(2, WHOLE))), (WHOLE,) * 2)


@pytest.mark.parametrize(("ranks", "peaks"), [(1, 2), (2, 1), (2, 0), (2, 3)])
def test_every_rank_has_its_peak(ranks: int, peaks: int, plan, tmp_path) -> None:
    problem = plan.problem.model_copy(update={"ranks": ranks})
    odd = plan.model_copy(update={"problem": problem, "rank_peak_bytes": (1000,) * peaks})
    odd.save(tmp_path / "plan.json")
    with pytest.raises(PlanFileError, match=f"rank_peak_bytes has {peaks} entries, problem.ranks is {ranks}"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_from_before_ranks_is_read(plan, tmp_path) -> None:
    plan.model_copy(update={"rank_peak_bytes": ()}).save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").problem.ranks == 1
