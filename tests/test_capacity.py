"""`evoplan fit-table`: the most residues that fit, found with few looks, and what is simulated is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evoplan.cost_model.devices import DEVICES
from evoplan.model.families import PRESETS, preset
from evoplan.planner.plans import capacity
from evoplan.planner.plans.capacity import (
    BEYOND,
    MOST,
    Asked,
    Capacity,
    capacities,
    distinct_presets,
    largest,
    published,
)
from evoplan.planner.plans.planning import NoPlanError, solve
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.reports.capacity import in_words
from tests.conftest import examples
from tests.test_cli import call


@examples(60)
@given(
    st.sampled_from([1, 8, 32, 96]), st.integers(1, 4), st.integers(0, 10**6), st.integers(1, 10**13),
    st.integers(1, 40), st.integers(1, MOST),
)  # fmt: skip
def test_bisection_finds_the_last_that_fits(
    unit: int, power: int, base: int, budget: int, start: int, beyond: int
) -> None:
    """Whatever power of the residues the peak is, and from where on none is known; none is asked twice."""
    looks: list[int] = []
    known: dict[int, int] = {}

    def peak(n: int) -> int:
        return base + 7 * n**power if n < beyond else BEYOND

    def least(n: int) -> int:
        if n not in known:
            assert n % unit == 0 or n == MOST
            looks.append(n)
            known[n] = peak(n)
        return known[n]

    found = largest(least, budget, unit, start * unit, known)
    assert found == 0 or least(found) <= budget
    if found < MOST - unit:
        assert peak(found + unit) > budget
    assert len(looks) < 45
    before = len(looks)
    assert largest(least, budget, unit, start * unit, known) == found
    assert len(looks) <= before + 2  # of the last that fits, and the one after it


def narrow(ranks: int = 1) -> Asked:
    return Asked("alphafold2-narrow", "inference", ranks, {"dtype": "float32"}, 4, step=64)


@pytest.mark.parametrize(("ranks", "sizes"), [(1, (60,)), pytest.param(2, (200, 60), marks=pytest.mark.slow)])
def test_what_is_found_fits_and_a_little_more_does_not(
    monkeypatch: pytest.MonkeyPatch, ranks: int, sizes: tuple[int, ...]
) -> None:
    """On devices of a few megabytes, the leaner one asked last."""
    small = {
        f"small-{mib}": replace(DEVICES["a100-40gb"], name=f"small-{mib}", memory_bytes=mib * 2**20)
        for mib in sizes
    }
    monkeypatch.setattr("evoplan.cost_model.devices.DEVICES", DEVICES | small)
    asked = narrow(ranks)
    rows = list(capacities(asked, list(small)))
    assert [row.device for row in rows] == [f"small-{mib}" for mib in sorted(sizes)]
    for row in rows:
        assert row.n_res
        assert row.n_res % 64 == 0
        assert row.peak_bytes <= row.memory_bytes
        assert row.step_seconds > 0
        with pytest.raises(NoPlanError):
            solve(cost_problem(asked.problem(row.n_res + asked.unit, row.device)))
    found = [row.n_res for row in rows]
    assert found == sorted(set(found))


def test_what_cannot_be_shared_says_why() -> None:
    (row,) = capacities(replace(narrow(8), rows=3), ["a100-40gb"])
    assert row.n_res is None
    assert "\n" not in row.why
    assert "8 ranks cannot share" in row.why
    assert "8 ranks cannot share" in in_words(row)
    assert in_words(replace(row, why="")).endswith("nothing fits")


def test_what_is_beyond_planning_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """More residues than a problem may have end the search, they are no error."""
    monkeypatch.setattr("evoplan.planner.problems.problem.MOST_LENGTH", 300)
    (row,) = capacities(narrow(), ["h200-141gb"])
    assert row.n_res == 256
    assert not row.why


def test_presets_that_only_their_residues_tell_apart_are_one() -> None:
    names = distinct_presets()
    assert "pairformer-48" in names
    assert "pairformer-48-640" not in names
    kinds = {(preset(name).config, replace(preset(name).shape, n_res=1)) for name in names}
    assert kinds == {(one.config, replace(one.shape, n_res=1)) for one in PRESETS.values()}
    assert len(kinds) == len(names)


def test_every_published_figure_names_its_source() -> None:
    for row in published():
        assert row["source"].startswith("https://")
        assert row["tokens"] > 0
        assert row["mode"] in ("training", "inference")
        assert row["about"]
        assert row["seconds"] is None or row["seconds"] > 0


def test_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it prints fits 80 columns, says what is simulated, and a line comes with each row."""

    def found(asked: Asked, devices: list[str]) -> list[Capacity]:
        return [
            Capacity(asked.model, asked.mode, asked.ranks, name, 2**34, 1024, 2**33, 12.5) for name in devices
        ]

    monkeypatch.setattr(capacity, "capacities", found)
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "table.json"
    code, printed, said = call(capsys, "fit-table", "--ranks", "1,64", "--json", str(path))
    assert code == 0
    lines = [line for line in printed.splitlines() if "https://" not in line]
    assert max(map(len, lines)) <= 80
    assert "simulated: the planner's least peak" in printed
    assert "published by others (not simulated)" in printed
    assert all(other["source"] in printed for other in published())
    document = json.loads(path.read_text())
    assert said.count("1024 residues, 12.5 s in 8 GiB\n") == len(document["rows"]) == 2 * 2 * 2 * 5
    assert {row["simulated"] for row in document["rows"]} == {True}
    assert {row["simulated"] for row in document["published"]} == {False}
    code, printed, _ = call(capsys, "fit-table", "--mode", "training", "--model", "all", "--json", str(path))
    assert code == 0
    assert "AlphaFold 3" not in printed  # whose figures are of inference
    assert {row["model"] for row in json.loads(path.read_text())["rows"]} == set(distinct_presets())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ranks", "1,65"], "from 1 to 64"),
        (["--model", "nope"], "unknown model"),
        (["--device", "cpu"], "'cpu'"),
    ],
)
def test_wrong_flags_are_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    code, printed, errors = call(capsys, "fit-table", *flags)
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert said in errors
