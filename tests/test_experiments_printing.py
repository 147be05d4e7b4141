"""What experiments print: tables, and a line for each part that is through where there is no terminal."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from evoplan.experiments import certificates, planning
from evoplan.experiments.interleaved import interleaved
from evoplan.planner.commands.terminal import progress
from evoplan.planner.reports.tables import print_table

GIB = 2**30


def printed(table: Table) -> str:
    console = Console(width=80, record=True)
    print_table(table, console)
    return console.export_text()


def test_parts_that_are_through_are_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working") as say:
        say("on the first")
        say.done("the first: [done]")
        say("on the second")
    captured = capsys.readouterr()
    assert captured.err == "the first: [done]\n"
    assert captured.out == ""


def test_interleaved_runs_tell_of_each_round() -> None:
    told: list[int] = []
    interleaved({"one": lambda: None}, 3, told=told.append)
    assert told == [1, 2, 3]


def test_figures_of_the_planner_are_tables() -> None:
    beside = {
        "s": 512, "r": 384, "large_activation_bytes": 3 * GIB, "planned_activation_bytes": 2 * GIB,
        "share": 2 / 3, "asked": 0.8, "time_over_large": {"1.5 GiB": 1.5, "2.5 GiB": 1.2, "4 GiB": 1.0},
    }  # fmt: skip
    frontier = {
        "blocks": 48, "budgets": 500, "seconds": 0.5, "bound_seconds": 2.0, "largest_gap": 0.002,
        "at_bytes": 3 * GIB, "median_gap": 0.001, "peak_rss_bytes": GIB,
    }  # fmt: skip
    gap = {
        "blocks": 4, "budget_bytes": GIB, "seconds": 1.25, "gap": 0.004, "depth_1_seconds": 1.5,
        "cp_sat_gap": 0.0, "cp_sat_seconds": 3.0,
    }  # fmt: skip
    texts = [
        printed(planning._beside_large([beside])),
        printed(planning._frontiers([frontier])),
        printed(planning._gaps([gap])),
    ]
    expected = (["3 GiB", "66.7%"], ["500 ms", "0.20%"], ["1.25 s", "0.40%"])
    for text, words in zip(texts, expected, strict=True):
        assert "{" not in text
        assert all(word in text for word in words)


def test_certificates_are_a_table_and_a_line_each() -> None:
    row: dict[str, Any] = {
        "budget_bytes": 2 * GIB, "seconds": 1.0, "gap": 0.0012, "own_gap": 0.001, "valid": True,
        "made_seconds": 0.5, "checked_seconds": 0.25, "file_bytes": 2048,
    }  # fmt: skip
    line = certificates._in_words(row, 3, 500)
    assert line == "3 of 500, 2 GiB: holds, gap 0.120%, checked in 250 ms"
    text = printed(certificates._table(certificates.summary([row])))
    assert "{" not in text
    assert "2 KiB" in text
    wrong = row | {"gap": None, "valid": False}
    assert "DOES NOT HOLD, no bound" in certificates._in_words(wrong, 1, 1)
