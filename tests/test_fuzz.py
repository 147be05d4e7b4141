"""The fuzzer finds no fault, and finds those that are put in."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evoplan.experiments import fuzz
from evoplan.experiments.fuzz_cases import draw_case
from evoplan.planner.execution.submodules import SubmoduleRuns
from evoplan.planner.execution.tape import Tape
from evoplan.planner.problems.costing import Costed

SEED = 4
CASE = "5:17"  # in double precision
MIXED = "3:2"  # at the least budget, so that steps run again


def run(*arguments: str) -> Result:
    return CliRunner().invoke(fuzz.command, arguments)


def faults(*arguments: str) -> str:
    """What is said of faults, by which the command has failed."""
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    return done.output


def test_no_faults(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    done = run("--cases", "25", "--seed", str(SEED), "--json", str(path))
    assert done.exit_code == 0, done.output
    assert "25 cases" in done.output
    assert "0 over budget, 0 wrong, 0 crash" in done.output
    found = json.loads(path.read_text())
    assert found["cases"] == 25
    assert found["faults"] == []
    assert 0.9 < found["ratios"]["median"] <= found["ratios"]["most"] <= 1


def test_a_case_is_drawn_from_its_number_alone() -> None:
    assert str(draw_case(5, 37)) == str(draw_case(5, 37)) != str(draw_case(6, 37))
    one, same = draw_case(5, 37).inputs(), draw_case(5, 37).inputs()
    assert all(one[name].equal(same[name]) and one[name].stride() == same[name].stride() for name in one)


@pytest.mark.parametrize("factor", [1.001, None])
def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch, factor: float | None) -> None:
    """Of the parameters: a little too large, or none."""
    vjp = SubmoduleRuns.vjp

    def wrong(runs, step, kept, grads, keep):
        found = vjp(runs, step, kept, grads, keep)
        of_state = len(step.reads)
        return *found[:of_state], *(None if factor is None else g * factor for g in found[of_state:])

    monkeypatch.setattr(SubmoduleRuns, "vjp", wrong)
    assert "wrong: gradient of " in faults("--case", CASE)


def test_a_prediction_that_is_too_low_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = Costed.predict

    def low(costed, schedule):
        predicted = predict(costed, schedule)
        less = predicted.peak_bytes // 30
        changed = {name: getattr(predicted, name) - less for name in ("peak_bytes", "activation_bytes")}
        return predicted.model_copy(update=changed)

    monkeypatch.setattr(Costed, "predict", low)
    assert "over budget: peak " in faults("--case", CASE)


def test_a_redo_outside_of_forwards_context_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    again = Tape._run_again

    def without_context(tape, kept):
        tape.runs.context = nullcontext()
        again(tape, kept)

    monkeypatch.setattr(Tape, "_run_again", without_context)
    assert "over budget: peak " in faults("--case", MIXED)


def test_what_is_raised_is_found_and_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tape, step, grad):
        raise RuntimeError("no record")

    monkeypatch.setattr(Tape, "backward", broken)
    said = faults("--cases", "3", "--seed", str(SEED))
    assert "crash: RuntimeError: no record" in said
    assert f"repeat with: python -m evoplan.experiments.fuzz --case {SEED}:" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cases", "0"], "--cases"),
        (["--minutes", "0"], "--minutes"),
        (["--case", "12"], "write SEED:INDEX like 0:17"),
        (["--case", "0:1", "--cases", "2"], "leave --cases and --minutes out"),
    ],
)
def test_bad_flags(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in done.output
