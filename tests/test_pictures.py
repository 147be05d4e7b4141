"""Pictures: labels inside the frame and not on each other, the exact frontier, marks on their lines."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from evoplan.experiments import benchmark, scale
from evoplan.experiments.benchmark_report import draw
from evoplan.model.config import InputShape
from evoplan.planner.plans.sweeping import frontier_points, sweep
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.reports.plot import draw_sweep, plt
from evoplan.planner.solvers import Frontier
from tests.conftest import TINY, examples
from tests.test_cli import SMALL, call
from tests.test_dp import tables
from tests.test_frontier import SCALE, times_longer
from tests.test_roofline import assert_legible

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


@pytest.fixture(scope="module")
def costed() -> Costed:
    return cost_problem(Problem(model="custom", config=TINY, shape=InputShape(9, 17)))


@pytest.fixture(scope="module")
def document(costed: Costed) -> dict[str, Any]:
    return sweep(costed)


@examples(24)
@given(tables(steps=(2, 3), most=3), st.integers(2, 6), st.data())
def test_steps_are_the_frontier_at_every_budget(table: Any, times: int, data: st.DataObject) -> None:
    """Between two steps the least time is the first one's, and below the least budget there is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoplan.planner.solvers.frontier.UNITS", 40)
        frontier = Frontier(times_longer(table, times, SCALE))
        steps = frontier.steps()
        assert all(one < other for (one, _), (other, _) in pairwise(steps))
        assert all(one > other for (_, one), (_, other) in pairwise(steps))
        assert frontier.seconds(steps[0][0] - 1) == np.inf
        for _ in range(8):
            budget = data.draw(st.integers(steps[0][0], steps[-1][0] + 5))
            assert frontier.seconds(budget) == [seconds for least, seconds in steps if least <= budget][-1]


def test_samples_lie_on_the_exact_frontier(costed: Costed, document: dict[str, Any]) -> None:
    steps = document["points"]
    for point in frontier_points(costed, Frontier(costed.table), 9):
        exact = [s["step_seconds"] for s in steps if s["budget_bytes"] <= point["budget_bytes"]][-1]
        assert point["step_seconds"] == pytest.approx(exact, rel=1e-9)


def test_a_sweep_writes_every_step_unless_fewer_are_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, few = tmp_path / "all.json", tmp_path / "few.json"
    assert call(capsys, "sweep", *SMALL, "--json", str(path))[0] == 0
    assert call(capsys, "sweep", *SMALL, "--points", "5", "--json", str(few))[0] == 0
    every, some = (json.loads(name.read_text())["points"] for name in (path, few))
    assert len(some) <= 5 < 60 < len(every)
    assert every[-1]["step_seconds"] == some[-1]["step_seconds"]
    assert "peak_bytes" in some[0]


def test_the_frontier_is_drawn_exactly_and_seed_dp_is_on_its_line(document: dict[str, Any]) -> None:
    figure = draw_sweep(document)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    drawn = list(zip(*(np.asarray(lines["planned"].get_data())), strict=True))
    assert [seconds for _, seconds in drawn] == [p["step_seconds"] for p in document["points"]]
    mark = document["baselines"]["seed-dp"]
    found = [(p["peak_bytes"], p["step_seconds"]) for p in document["seed_dp_points"]]
    assert (mark["peak_bytes"], mark["step_seconds"]) in found
    assert {note.get_text() for note in axes.texts} == set(document["baselines"])
    assert_legible(axes, axes.texts)
    plt.close(figure)


def test_the_labels_of_the_benchmark() -> None:
    """Of the figures that are kept, and their picture is drawn from them alone."""
    kept = json.loads((RESULTS / "benchmark-cpu.json").read_text())
    figure = draw(kept)
    for axes, found in zip(figure.axes, kept["sizes"], strict=True):
        by_hand = {name for name in found["runs"] if not name.startswith("plan")}
        assert {note.get_text() for note in axes.texts} == by_hand
        assert_legible(axes, axes.texts)
    plt.close(figure)


def test_the_benchmark_is_redrawn_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "run_size", None)
    path = tmp_path / "figures.json"
    path.write_text((RESULTS / "benchmark-cpu.json").read_text())
    benchmark.benchmark.main(["--redraw", "--json", str(path)], standalone_mode=False)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for text in ("{}", "[", '{"sizes": [{}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="leave --redraw out"):
            benchmark.benchmark.main(["--redraw", "--json", str(path)], standalone_mode=False)


def test_the_study_of_many_devices_has_one_colour_for_one_thing() -> None:
    rows = json.loads((RESULTS / "scale.json").read_text())["rows"]
    figure = scale.draw(rows, "a title")
    upper, lower = figure.axes
    colours = [{line.get_label(): to_hex(line.get_color()) for line in axes.lines} for axes in (upper, lower)]
    assert colours[0]["planned"] == colours[1]["planned"]
    every = {**colours[0], **colours[1]}
    assert len(set(every.values())) == len(every) == 4
    assert [note.get_text() for note in upper.texts] == [f"{r['replicas']} x {r['ranks']}" for r in rows]
    assert_legible(upper, upper.texts)
    plt.close(figure)
