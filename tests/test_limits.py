"""Numbers beyond any machine, sizes as errors say them, and what solvers may claim."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evoplan.model import EvoformerConfig, InputShape
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.plans.planning import NoPlanError, solve
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.sizes import exact_size, format_rate, format_size, parse_size
from evoplan.planner.solvers import BASELINES, SOLVERS, Solver, solver
from evoplan.planner.solvers.inference import inference_schedule
from tests.test_cli import call

TINY = ["--model", "alphafold2-narrow", "--n-blocks", "1", "--n-seq", "2", "--n-res", "3"]
TINY += ["--c-m", "8", "--c-z", "8", "--mode", "inference"]
HUGE = ["1000000000", "1" + "0" * 30]


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize(
    "flags",
    [
        *(
            ["plan", *TINY, flag]
            for flag in ("--n-blocks", "--n-seq", "--n-res", "--c-m", "--c-z", "--batch")
        ),
        ["plan", *TINY, "--ranks"],
        ["plan", "--model", "alphafold2-trunk", "--mode", "inference", "--n-extra"],
        ["plan", "--model", "tiny-openfold", "--n-blocks"],
        ["plan", "--model", "tiny-openfold", "--c-z"],
        ["roofline", *TINY, "--c-m"],
        ["sweep", *TINY, "--points"],
        ["profile", *TINY, "--repeats"],
        ["verify", "plan.json", "--repeats"],
        *(["run", "plan.json", flag] for flag in ("--steps", "--timeout", "--learning-rate", "--save-every")),
    ],
    ids=lambda flags: " ".join(flags[-1:]),
)
def test_huge_numbers_are_refused_at_once(
    capsys: pytest.CaptureFixture, flags: list[str], number: str
) -> None:
    start = time.process_time()
    code, out, error = call(capsys, *flags, number)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "plan.json: cannot be read" not in error
    assert time.process_time() - start < 10


def test_a_reserve_may_be_nothing(capsys: pytest.CaptureFixture) -> None:
    plan = ["plan", *TINY, "--memory", "1GiB"]
    assert call(capsys, *plan, "--reserve", "0")[0] == call(capsys, *plan)[0] == 0
    assert call(capsys, *plan, "--reserve", "1GiB")[0] == 3
    assert call(capsys, *plan, "--reserve=-1")[0] == 2
    assert parse_size("0", least=0) == parse_size(0, least=0) == 0
    with pytest.raises(ValueError, match="write it like"):
        parse_size("", least=0)


@pytest.mark.parametrize("flag", ["--link", "--memory"])
def test_huge_sizes_are_no_sizes(capsys: pytest.CaptureFixture, flag: str) -> None:
    code, _, error = call(capsys, "plan", *TINY, flag, "1" + "0" * 30)
    assert (code, error.count("\n")) == (2, 1)
    assert "is more memory than there is" in error


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("certificates", ["--budgets", "0"]),
        ("certificates", ["--blocks", "-1"]),
        ("certificates", ["--json", "/nonexistent/x.json"]),
        ("offload", ["--budgets", "0"]),
        ("offload", ["--host", "lots"]),
        ("offload", ["--json", "/nonexistent/x.json"]),
        ("overhead", ["--rounds", "-1"]),
        ("overhead", ["--rounds", "many"]),
        ("planning", ["--skip"]),
        ("accuracy", ["float31"]),
        ("demo", ["no/such/\0"]),
        ("demo", ["file/in"]),
    ],
    ids=str,
)
def test_experiments_say_in_a_line_what_they_do_not_take(
    program: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    command = importlib.import_module(f"evoplan.experiments.{program}").command
    run_command(command, program, ["--help"])
    assert "Usage: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run_command(command, program, arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("program", "flag"),
    [
        *(("tiny_openfold.__main__", flag) for flag in ("--num-steps", "--save-every", "--num-blocks")),
        *(("flops.__main__", flag) for flag in ("--num-steps", "--num-blocks", "--seq-len", "--msa-dim")),
        *(("scaling", flag) for flag in ("--gpus", "--steps", "--runs", "--batch-per-gpu")),
        *(("times", flag) for flag in ("--rounds", "--repeats")),
        ("benchmark", "--rounds"),
        *(("certificates", flag) for flag in ("--budgets", "--blocks")),
        *(("offload", flag) for flag in ("--budgets", "--blocks")),
        ("overhead", "--rounds"),
        ("scale", "--most"),
    ],
)
def test_experiments_refuse_them_too(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"evoplan.experiments.{program}")
    (command,) = (value for value in vars(module).values() if isinstance(value, click.Command))
    with pytest.raises(SystemExit) as stop:
        run_command(command, "program", [flag, "1000000000"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1,023 bytes"),
        (1024, "1 KiB (1,024 bytes)"),
        (3 * 2**29, "1.5 GiB (1,610,612,736 bytes)"),
        (2**40 - 1, "1 TiB (1,099,511,627,775 bytes)"),
        (2**50, "1 PiB (1,125,899,906,842,624 bytes)"),
        (2**20 * 1000, "1000 MiB (1,048,576,000 bytes)"),
        (10**15 + 1, "909.5 TiB (1,000,000,000,000,001 bytes)"),
        (2**60 - 1, "1 EiB (1,152,921,504,606,846,975 bytes)"),
        (-(2**20), "-1 MiB (-1,048,576 bytes)"),
    ],
)
def test_exact_sizes(size: int, text: str) -> None:
    """The figure in them is a size that can be given."""
    assert exact_size(size) == text
    if size > 0:
        assert parse_size(text.partition("(")[2].strip(")") or text) == size


@given(st.integers(1, 2**60))
def test_sizes_are_read_as_they_are_printed(size: int) -> None:
    """To the four digits that there are, and to the byte where it is exact."""
    text = format_size(size)
    assert "e" not in text.lower().replace("eib", "")
    assert float(text.split()[0]) < 1024
    read = parse_size(text)
    assert abs(read - size) <= size / 1000
    assert size < 2**20 or format_size(read) == text  # a byte is more than the last digit of a KiB
    exact = exact_size(size)
    assert parse_size(exact.partition("(")[2].strip(")") or exact) == size


@given(st.integers(1, 999), st.sampled_from("kMGTP"))
def test_decimal_sizes_are_decimal(count: int, prefix: str) -> None:
    size = count * 1000 ** ("kMGTP".index(prefix) + 1)
    assert parse_size(f"{count}{prefix}B") == parse_size(f"{count}.000 {prefix.lower()}b") == size
    assert format_rate(size, "B/s") == f"{count} {prefix}B/s"


@pytest.mark.parametrize("text", ["2EB", "1024.1PiB", "1,152,921,504,606,846,977 bytes", "9" * 5000])
def test_more_memory_than_there_is(text: str) -> None:
    with pytest.raises(ValueError, match="is more memory than there is; write it like 16GiB") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("text", ["1,00", "1,0000", ",100", "1,000.5 MB", "1,000,"])
def test_commas_are_for_thousands(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_the_least_budget_can_be_copied(capsys: pytest.CaptureFixture) -> None:
    code, _, error = call(capsys, "plan", *TINY, "--memory", "2KiB")
    assert code == 3
    assert "no plan fits a budget of 2 KiB (2,048 bytes); the least that does is " in error
    least = error.split("the least that does is ")[1].split("(")[1].split(")")[0]
    assert least.endswith(" bytes")
    code, out, _ = call(capsys, "plan", *TINY, "--memory", least)
    assert code == 0
    assert f"({least})" in out
    assert call(capsys, "plan", *TINY, "--memory", str(parse_size(least) - 1))[0] == 3


@pytest.fixture(scope="module")
def costed():
    config = EvoformerConfig(1, 8, 8, 1, 1, 8, 4, 8, 2, c_head_msa=8)
    problem = Problem(model="custom", config=config, shape=InputShape(2, 3), mode="inference")
    return cost_problem(problem)


def test_only_exact_solvers_claim_a_gap(costed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A property of the solver where it is registered: a function that somebody adds claims nothing."""
    monkeypatch.setitem(SOLVERS, "mine", lambda table, _: BASELINES["none"](table))
    monkeypatch.setitem(SOLVERS, "proven", Solver(inference_schedule, exact_in_inference=True))
    gaps = {name: solve(costed, name).solver.gap for name in SOLVERS}
    exact = {"dp", "cp-sat", "seed-dp", "proven"}
    assert gaps == {name: 0.0 if name in exact else None for name in SOLVERS}
    assert {name for name in SOLVERS if solver(name).exact_in_inference} == exact
    with pytest.raises(ValueError, match="unknown solver 'other'; choose one of: dp, cp-sat"):
        solver("other")


def test_a_baseline_says_what_it_needs(costed) -> None:
    problem = costed.problem.model_copy(update={"budget_bytes": 2048})
    tight = replace(costed, problem=problem)
    says = r"none needs .*KiB \([\d,]+ bytes\), the budget is 2 KiB \(2,048 bytes\)"
    with pytest.raises(NoPlanError, match=says):
        solve(tight, "none")


def test_the_plan_file_says_the_gap(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for name, gap in (("dp", 0), ("none", None)):
        path = tmp_path / f"{name}.json"
        assert call(capsys, "plan", *TINY, "--solver", name, "--out", str(path))[0] == 0
        assert json.loads(path.read_text())["solver"]["gap"] == gap
