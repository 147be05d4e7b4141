"""Plan files: what is written is read back; what is broken is refused in one line."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evoplan.model import EvoformerConfig, InputShape
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.checking.consistency import check_consistent, load_consistent
from evoplan.planner.plans.plan import load_plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.plans.sealed import PlanFileError
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, shortened
from evoplan.planner.schedules.text import schedule_from_json, schedule_to_json

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


def _sealed(document: Any, path: Path) -> Path:
    """A file with the right digest, whatever it holds."""
    content = {name: value for name, value in document.items() if name != "digest"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "digest": hashlib.sha256(canonical.encode()).hexdigest()}))
    return path


def _places(document: Any, *before: Any) -> Iterator[tuple]:
    """The way to every field and element."""
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in inside:
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from _places(value, *before, key)


def _with(document: Any, place: tuple, value: Any) -> Any:
    changed = json.loads(json.dumps(document))
    *way, last = place
    inside = changed
    for key in way:
        inside = inside[key]
    inside[last] = value
    return changed


DEEP: Any = "whole"
for _ in range(100):
    DEEP = [DEEP]
# Values of each type, most of which are no amount of anything.
OTHERS: list[Any] = [None, True, -1, 10**400, 1.5, float("nan"), float("inf"), "", "1", "a\nb", "\ud800"]
OTHERS += ["x" * 10_000, [], [None], DEEP, {}, {"a": 1}]
NEVER = ("", "a\nb", "\ud800", "x" * 10_000)  # not even where a text is expected
# What may be left out, and with it all that is in it.
OPTIONAL = {"gap", "only_whole", "least_feasible_bytes", "budget_bytes", "own_device", "link", "n_extra"}
OPTIONAL |= {"mixed", "given", "model_digest"}


def test_no_field_takes_another_type(plan, tmp_path: Path) -> None:
    """Every field, and every element of the schedule, replaced by values of other types and sealed again."""
    document = plan.to_json()
    del document["digest"]
    tried = 0
    for place in _places(document):
        value = document
        for key in place:
            value = value[key]
        for other in OTHERS:
            same = type(other) is type(value) or {type(other), type(value)} == {int, float}
            fits = place[-1] in OPTIONAL and type(other) in (type(None), int, float, list)
            if fits or (same and other not in NEVER):
                continue
            path = _sealed(_with(document, place, other), tmp_path / "odd.json")
            with pytest.raises(PlanFileError) as caught:
                load_plan(path)
            said = str(caught.value)
            assert said.startswith(f"{path}: ")
            assert "\n" not in said
            assert len(said) < 400
            tried += 1
    assert tried > 1000


@pytest.mark.parametrize("place", [("static", "inputs"), ("predicted", "step_seconds"), ("solver", "gap")])
@pytest.mark.parametrize("value", [-1, -1.5, 10**400, 1e999, float("nan")])
def test_amounts_are_amounts(plan, tmp_path: Path, place: tuple, value: float) -> None:
    path = _sealed(_with(plan.to_json(), place, value), tmp_path / "odd.json")
    with pytest.raises(PlanFileError, match=r"^\S+: [^\n]+; make it again with `evoplan plan --out`$"):
        load_plan(path)


@pytest.mark.parametrize(
    "config",
    [None, 3, "alphafold2", [1], [{"n_block": 2}], {"extra": 1, "main": []}, {"c_pair_features": {}}],
)
def test_a_configuration_that_is_none(plan, tmp_path: Path, config: Any) -> None:
    path = _sealed(_with(plan.to_json(), ("problem", "config"), config), tmp_path / "plan.json")
    with pytest.raises(PlanFileError, match=r"problem\.config"):
        load_plan(path)


def _nested(times: int) -> list:
    parts: list = [[step, "whole"] for step in range(18)]
    for _ in range(times):
        parts = [{"checkpoint": parts, "discard": ["whole"] * 18}]
    return parts


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": _nested(40)}, "more checkpoints within one another than steps"),
        ({"schedule": [[True, "whole"]]}, r"schedule: \[True, 'whole'\] is no part of a schedule"),
        ({"schedule": [[0, "x" * 10**6]]}, r"schedule: 'x{50,60}\.\.\. is no strategy"),
        ({"costs": {"time": "guessed", "memory": "traced"}}, "costs.time is 'guessed'; there are: measured"),
        ({"static": {"parameters": 1}}, "static lacks gradients"),
        ({"rank_peak_bytes": [7]}, "predicted.peak_bytes is not the largest of rank_peak_bytes"),
    ],
)
def test_nonsense_is_refused_at_once(plan, tmp_path: Path, changes: dict, says: str) -> None:
    path = _sealed({**plan.to_json(), **changes}, tmp_path / "plan.json")
    with pytest.raises(PlanFileError, match=says):
        load_plan(path)


def test_figures_add_up(plan, tmp_path: Path) -> None:
    document = plan.to_json()
    for place, says in (
        (("predicted", "peak_bytes"), "predicted: peak_bytes is not static_bytes"),
        (("baselines", "none", "activation_bytes"), r"baselines.none: peak_bytes is not static_bytes"),
        (("static", "inputs"), "static is not the parts of predicted.static_bytes"),
    ):
        path = _sealed(_with(document, place, 8), tmp_path / "plan.json")
        with pytest.raises(PlanFileError, match=says):
            load_plan(path)


def test_an_endless_file_is_not_read(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "plan.json").symlink_to("/dev/zero")
    with pytest.raises(PlanFileError, match="too long for a plan file"):
        load_plan(tmp_path / "plan.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 2**10  # KiB
    for text in ("9" * 5000, "[" * 100_000):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(PlanFileError, match="not a plan file"):
            load_plan(tmp_path / "odd.json")


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("problem", "config", "n_block"), 3, "schedule: it has 18 steps, the model 27"),
        (("problem", "config", "c_opm"), 6, "static.parameters is not that of its model"),
        (("problem", "dtype"), "float64", "static.parameters is not that of its model"),
        (("problem", "optimizer"), "sgd", "static.optimizer is not that of its model"),
        (("problem", "mode"), "inference", "schedule|static.gradients"),
        (("problem", "shape", "n_seq"), 10**5, "static.inputs is less than its shapes take"),
        (("problem", "shape", "batch"), 4000, "static.inputs is less than its shapes take"),
        (("problem", "device"), "abacus", "unknown device 'abacus'"),
        (("problem", "config", "n_block"), 10**9, "1000000000 blocks are too many to plan for; at most 1024"),
        (("problem", "config", "c_m"), 10**9, "beyond any machine"),
        (("problem", "shape", "n_extra"), 10**9, "which this model does not read"),
    ],
)
def test_a_plan_is_its_problems(plan, tmp_path: Path, place: tuple, value: Any, says: str) -> None:
    """One field resealed: what would run is not what was planned, and may take any memory."""
    path = _sealed(_with(plan.to_json(), place, value), tmp_path / "plan.json")
    with pytest.raises(PlanFileError, match=says) as caught:
        load_consistent(str(path))
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ("chunk(seq, 99999999999999999999)", "cannot cut 5 into 99999999999999999999 pieces"),
        ("chunk(day, 2)", "has no axis 'day'"),
        ("coshard(seq, 2)", "seq is cut by chunk, not coshard"),
        ("chunk(head, 2)", "head is cut by coshard, not chunk"),
        ("whole+magic", "unknown kernel 'magic'"),
    ],
)
def test_strategies_are_the_steps(plan, strategy: str, says: str) -> None:
    whole = [[step, "whole"] for step in range(1, 18)]
    odd = plan.model_copy(update={"schedule": schedule_from_json([[0, strategy], *whole])})
    with pytest.raises(
        ValueError, match=r"^schedule: blocks\.0\.row_attention: .*; make it again$"
    ) as caught:
        check_consistent(odd)
    assert says in str(caught.value)
    check_consistent(plan.model_copy(update={"schedule": schedule_from_json([[0, "chunk(seq, 5)"], *whole])}))
