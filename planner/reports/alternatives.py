"""What a plan would cost otherwise, as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from evoplan.planner.plans.alternatives import Alternative
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import format_seconds, format_size

SHOWN = 4  # of each submodule: the fastest that fit, and the fastest that do not


def print_alternatives(found: list[Alternative], console: Console) -> None:
    """A few of each submodule."""
    table = new_table(
        "had a submodule run another way in every block", "submodule", "strategy", "step time", "peak", ""
    )
    for kind in dict.fromkeys(row.submodule for row in found):
        own = [row for row in found if row.submodule == kind]
        fit, not_fit = ([row for row in own if row.fits is fits] for fits in (True, False))
        named = [row for row in own if row.strategy == "whole"]
        shown = dict.fromkeys([*fit[:SHOWN], *not_fit[: 1 if fit else SHOWN], *named])
        for row in sorted(shown, key=lambda row: row.step_seconds):
            table.add_row(
                kind,
                row.strategy,
                _signed(format_seconds(abs(row.more_seconds)), row.more_seconds),
                _signed(format_size(abs(row.more_bytes)), row.more_bytes),
                "" if row.fits else "does not fit",
            )
            kind = ""
    print_table(table, console, keys=2)


def _signed(text: str, value: float) -> str:
    return "as now" if value == 0 else ("+" if value > 0 else "-") + text


def alternatives_to_json(found: list[Alternative]) -> list[dict[str, Any]]:
    """All of it as plain types."""
    return [asdict(row) for row in found]
