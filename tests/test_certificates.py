"""Certificates: the checker takes what holds, and turns down what was altered; commands say what to do."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import AsWritten, Forward
from evoplan.cost_model.trace import Work
from evoplan.planner.plans.certificate import certificate, decimal, sealed
from evoplan.planner.solvers import Frontier
from evoplan.planner.solvers.bounds import dividing_unit
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.proof import best_proof
from evoplan.planner.solvers.relaxed import Relaxed
from tests.brute_force import by_charges, least_seconds
from tests.test_cli import SMALL, call
from tests.test_dp import UNITS, cases, stacked, tables
from tests.test_fit_commands import BUILDS

CHECKER = Path(__file__).parents[1] / "tools" / "check_certificate.py"
_SPEC = importlib.util.spec_from_file_location("check_certificate", CHECKER)
assert _SPEC is not None
assert _SPEC.loader is not None
checker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(checker)


def document_of(table: CostTable, budget: int) -> dict[str, Any]:
    return certificate(table, Frontier(table).schedule(budget), budget, {})


def verdict(document: dict[str, Any], tmp_path: Path) -> int:
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(document))
    code: int = checker.main(path)
    return code


def resealed(document: dict[str, Any]) -> dict[str, Any]:
    return sealed({key: value for key, value in document.items() if key != "digest"})


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where numbers are in a document, by keys; exact times are numbers in quotes."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, inner in pairs for place in places(inner, (*at, key))]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return [at] if number or at[-1] in ("seconds", "price") else []


def altered(document: dict[str, Any], place: tuple[Any, ...], more: int) -> dict[str, Any]:
    """A copy with one number changed."""
    copy = deepcopy(document)
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    old = inner[place[-1]]
    inner[place[-1]] = decimal(Fraction(old) + more) if isinstance(old, str) else old + more
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


def some_budget(table: CostTable, share: float) -> int:
    frontier = Frontier(table)
    budgets = frontier.budgets(12)
    return max(budgets[int(share * (len(budgets) - 1))], frontier.least_replay.peak_bytes)


@cases(48)
@given(tables(steps=(1, 4), several=True), st.integers(1, 3), st.floats(0, 1))
def test_the_checker_takes_what_is_made(folder: Path, table: CostTable, times: int, share: float) -> None:
    """Its own program finds the same bound to the last picosecond: one more is turned down."""
    chain = replace(stacked(table, times), step_makes=table.makes * times)
    document = document_of(chain, some_budget(chain, share))
    assert verdict(document, folder) == 0
    if document["bound"]["seconds"] is not None:
        higher = deepcopy(document)
        higher["bound"]["seconds"] = decimal(Fraction(document["bound"]["seconds"]) + Fraction(1, 10**12))
        assert verdict(resealed(higher), folder) == 1


@cases(100)
@given(tables(steps=(1, 3)), st.floats(0, 1), st.data(), st.integers(-3, 3).filter(bool))
def test_one_number_altered(
    folder: Path, table: CostTable, share: float, data: st.DataObject, more: int
) -> None:
    """It is turned down by the seal; sealed anew, unless what it claims then is true of the table it has."""
    document = document_of(table, some_budget(table, share))
    place = data.draw(st.sampled_from(places(document)))
    changed = altered(document, place, more)
    assert verdict(changed, folder) == 1
    code = verdict(resealed(changed), folder)
    if place[0] == "plan":
        assert code == 1
    if place == ("bound", "seconds"):
        assert code == (1 if more > 0 or Fraction(document["bound"]["seconds"]) + more < 0 else 0)
    if code == 0:
        proof, budget = changed["bound"], changed["budget_bytes"]
        assert changed["plan"]["peak_bytes"] <= budget
        true = least_of(changed["table"], budget)
        assert proof["seconds"] is None or float(proof["seconds"]) <= true + 1e-9


def least_of(table: dict[str, Any], budget: int) -> float:
    """Least seconds of any schedule, by every schedule there is, on the table of a certificate."""
    read = table_of(table)
    memory = budget - read.bytes_of(read.liveness.outputs)
    return float(least_seconds(read, max(0, memory), by_charges)[memory]) if memory >= 0 else np.inf


def _ending(document: dict[str, Any] | None) -> Forward | None:
    return document and Forward(document["forward_bytes"], Work(), document["forward_seconds"])


def table_of(document: dict[str, Any]) -> CostTable:
    from evoplan.cost_model.steps import StepCost
    from evoplan.model.running.strategy import Strategy

    apart = "ending", "keeps_made", "backward_bytes", "first_backward_bytes"
    options = [
        tuple(
            StepCost(
                Strategy.parse(name),
                discard_work=Work(), forward_work=Work(), backward_work=Work(),
                **{key: value for key, value in cost.items() if key not in apart},
                backward_bytes=cost["backward_bytes"][0],
                backward_held_bytes=cost["backward_bytes"][1],
                as_written=AsWritten(*cost["first_backward_bytes"]),
                keeps_made=tuple(cost["keeps_made"]),
                unread=_ending(cost["ending"]),
            )
            for name, cost in offered.items()
        )
        for offered in document["options"]
    ]  # fmt: skip
    steps, groups = [], []
    for block in document["groups"]:
        start = len(steps)
        steps += [document["steps"][number] for number in document["blocks"][block]]
        groups.append(range(start, len(steps)))
    return CostTable(
        options=tuple(options[step["options"]] for step in steps),
        step_reads=tuple(tuple(step["reads"]) for step in steps),
        step_makes=tuple(tuple(step["makes"]) for step in steps),
        groups=tuple(groups),
        state_bytes=document["state_bytes"],
        loss_bytes=document["loss_bytes"],
        training=True,
        outputs=tuple(document["outputs"]),
    )


@cases(60)
@given(tables(steps=(1, 4), several=True), st.integers(1, 12), st.integers(0, 40))
def test_no_schedule_beats_the_relaxed_program(table: CostTable, unit: int, price: int) -> None:
    optimum = least_seconds(table, UNITS, by_charges)
    outputs = table.bytes_of(table.liveness.outputs)
    for memory in range(0, UNITS, 11):
        bound = Relaxed(table, outputs + memory, unit).seconds(Fraction(price, 10))
        assert (np.inf if bound is None else float(bound)) <= optimum[memory] + 1e-9


@cases(20)
@given(tables(steps=(1, 4)), st.integers(1, 3))
def test_in_bytes_it_is_exact(table: CostTable, times: int) -> None:
    chain = stacked(table, times)
    expected = Program(chain, 1, UNITS).times
    outputs = chain.bytes_of(chain.liveness.outputs)
    for memory in range(0, UNITS, 13):
        bound = Relaxed(chain, outputs + memory, 1).seconds(Fraction(0))
        assert (np.inf if bound is None else float(bound)) == pytest.approx(expected[memory])


def test_on_real_costs(stack_table: CostTable, folder: Path) -> None:
    """Equal blocks are stored once; the bound is close; what only weakens the claim is taken."""
    frontier = Frontier(stack_table)
    for budget in frontier.budgets(4)[1:]:
        document = document_of(stack_table, budget)
        assert len(document["table"]["blocks"]) <= 2
        assert len(document["table"]["steps"]) <= 2 * len(stack_table.groups[0])
        assert verdict(document, folder) == 0
        assert float(document["plan"]["seconds"]) <= 1.02 * float(document["bound"]["seconds"])
        weaker = deepcopy(document)
        weaker["bound"]["seconds"] = decimal(Fraction(document["bound"]["seconds"]) * 99 / 100)
        assert verdict(resealed(weaker), folder) == 0
        assert verdict(weaker, folder) == 1


def test_a_price_proves_more_where_many_parts_are_held(stack_table: CostTable, folder: Path) -> None:
    """The checker finds as much at that price, and no more."""
    budget = Frontier(stack_table).budgets(10)[-3]
    found = best_proof(stack_table, budget, units=64)
    without = Relaxed(stack_table, budget, found.unit_bytes).seconds(Fraction(0))
    assert found.seconds is not None
    assert without is not None
    assert found.price > 0
    assert found.seconds > without
    document = document_of(stack_table, budget)
    for more, code in ((0, 0), (Fraction(1, 10**12), 1)):
        about = {"price": decimal(found.price), "seconds": decimal(found.seconds + more)}
        document["bound"] |= about | {"unit_bytes": found.unit_bytes}
        assert verdict(resealed(document), folder) == code


@given(st.integers(1, 10**6), st.integers(16, 4096), st.integers(1, 3))
def test_a_grid_step_is_about_what_is_asked(span: int, units: int, finer: int) -> None:
    table = CostTable((), (), (), {"m": 1000, "z": 700}, 0, True)
    unit = dividing_unit(table, span, units, finer)
    assert span / (finer * units) <= unit <= 2 * finer * -(-span // (finer * units))
    if unit <= 1000 and unit == dividing_unit(table, span, units):
        assume(unit == 100)
        assert 1000 % unit == 700 % unit == 0


def test_the_checker_stands_alone(folder: Path, stack_table: CostTable) -> None:
    """Nothing but the standard library, no floats, and short enough to be read."""
    text = CHECKER.read_text()
    assert len(text.splitlines()) < 150
    tree = ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or n.names[0].name for n in imports}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)
    budget = Frontier(stack_table).budgets(3)[1]
    path = folder / "alone.json"
    path.write_text(json.dumps(document_of(stack_table, budget)))
    unchecked = subprocess.run([sys.executable, "-O", CHECKER, path], capture_output=True, text=True)
    assert unchecked.returncode == 1
    assert "without" in unchecked.stderr
    done = subprocess.run([sys.executable, "-I", "-S", CHECKER, path], capture_output=True, text=True)
    assert done.returncode == 0
    assert "valid" in done.stdout


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": "evoplan-plan"}', "null", "\0", "[" * 5000, '{"budget_bytes": NaN}'],
)
def test_unreadable_is_told_from_invalid(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(text)
    assert checker.main(path) == 2
    assert checker.main(tmp_path / "none.json") == 2
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_numbers_that_are_none_prove_nothing(folder: Path, stack_table: CostTable) -> None:
    """A budget or grid step of NaN would have no memory at all, for which any bound holds; sealed anew."""
    document = document_of(stack_table, Frontier(stack_table).budgets(3)[1])
    paths = []
    for name, value in (("budget_bytes", math.nan), ("budget_bytes", math.inf), ("unit_bytes", math.nan)):
        forged = json.loads(json.dumps(document))
        (forged if name in forged else forged["bound"])[name] = value
        forged["bound"]["seconds"] = "1" * 9
        paths.append(folder / f"{len(paths)}.json")
        paths[-1].write_text(json.dumps(resealed(forged)))
        assert checker.main(paths[-1]) == 2
    good = folder / "good.json"
    good.write_text(json.dumps(document))
    run = partial(subprocess.run, capture_output=True, text=True)
    assert run([sys.executable, CHECKER, good, paths[0]]).returncode == 2  # every file counts
    none = run([sys.executable, CHECKER])
    assert (none.returncode, none.stderr) == (2, "")
    assert "check_certificate.py CERTIFICATE.json" in none.stdout


def test_certify_writes_what_the_checker_takes(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "certificate.json"
    assert call(capsys, "plan", *SMALL, "--memory", "6MB", "--out", str(plan))[0] == 0
    code, said, _ = call(capsys, "certify", str(plan), "--out", str(out))
    assert code == 0
    assert "slower than any of the persistent schedules" in said
    assert checker.main(out) == 0
    stated, peak = json.loads(out.read_text()), json.loads(plan.read_text())["predicted"]["peak_bytes"]
    assert stated["plan"]["peak_bytes"] + stated["about"]["beside_the_chain_bytes"] == peak


def test_certify_says_what_to_do(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    plan, out, source = tmp_path / "plan.json", tmp_path / "certificate.json", tmp_path / "mine.py"
    source.write_text(BUILDS)

    def refused(*arguments: str) -> str:
        code, _, error = call(capsys, "certify", *arguments, "--out", str(out))
        assert code == 2
        assert len(error.strip().splitlines()) == 1
        assert not out.exists()
        return error

    assert "cannot be read" in refused(str(plan))
    plan.write_text("{")
    assert "cut off or not JSON" in refused(str(plan))
    assert call(capsys, "plan", *SMALL, "--memory", "6MB", "--out", str(plan))[0] == 0
    assert "leave --from out" in refused(str(plan), "--from", f"{source}:build")
    document = json.loads(plan.read_text())
    document["predicted"]["step_seconds"] *= 0.5
    plan.write_text(json.dumps(document))
    assert "altered" in refused(str(plan))
    inference = ["--memory", "6MB", "--mode", "inference", "--out", str(plan)]
    assert call(capsys, "plan", *SMALL, *inference)[0] == 0
    assert "is for training" in refused(str(plan))
    made = ["plan", "--from", f"{source}:build", "--memory", "75KB", "--out", str(plan)]
    assert call(capsys, *made)[0] == 0
    assert "add --from" in refused(str(plan))
    assert "builds" not in refused(str(plan), "--from", f"{source}:odd")


def test_plans_of_fitted_models_are_certified(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    plan, out, source = tmp_path / "plan.json", tmp_path / "certificate.json", tmp_path / "mine.py"
    source.write_text(BUILDS)
    made = ["--from", f"{source}:build", "--memory", "75KB", "--certify", "--out", str(plan)]
    code, said, _ = call(capsys, "plan", *made)
    assert code == 0
    assert "a gap of" in said
    assert json.loads(plan.read_text())["solver"]["gap"] is not None
    page = tmp_path / "page.html"
    assert call(capsys, "show", str(plan), "--html", str(page))[0] == 0
    assert "none is faster than" in page.read_text()
    code, said, _ = call(capsys, "certify", str(plan), "--from", f"{source}:build", "--out", str(out))
    assert code == 0
    assert "in the room that the code around the blocks leaves them under this plan" in said
    assert said.count("in the room") == json.loads(out.read_text())["class"].count("in the room") == 1
    assert checker.main(out) == 0
