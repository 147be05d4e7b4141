"""How much fits on which device, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from evoplan.planner.plans.capacity import Capacity
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import format_seconds, format_size

SIMULATED = (
    "simulated: the planner's least peak, traced, of the stack alone; times are lower bounds (roofline). "
    "Nothing here was measured on these devices."
)
PUBLISHED = "others' figures are of whole predictions or training steps, as their authors state them"


def in_words(row: Capacity) -> str:
    """A row as a line."""
    about = f"{row.model} {row.mode}, {row.ranks} rank{'s' * (row.ranks > 1)}, {row.device}"
    if row.n_res is None:
        return f"{about}: {row.why or 'nothing fits'}"
    assert row.step_seconds is not None
    assert row.peak_bytes is not None
    return (
        f"{about}: {row.n_res} residues, {format_seconds(row.step_seconds)} in {format_size(row.peak_bytes)}"
    )


def print_capacities(rows: Sequence[Capacity], others: Sequence[dict[str, Any]], console: Console) -> None:
    """Ours, and beside them what others have published, with the sources."""
    table = new_table("the most residues (simulated)", "model", "mode", "ranks", "device", "residues", "step")
    last: tuple[str, str, int] | None = None
    for row in rows:
        key = row.model, row.mode, row.ranks
        told = ("", "", "") if key == last else (row.model, row.mode, str(row.ranks))
        residues = "none" if row.n_res is None else str(row.n_res)
        step = "-" if row.step_seconds is None else format_seconds(row.step_seconds)
        table.add_row(*told, row.device, residues, step)
        last = key
    print_table(table, console, keys=4)
    for why in dict.fromkeys(f"{row.model} on {row.ranks} ranks: {row.why}" for row in rows if row.why):
        console.print(why, highlight=False)
    console.print(SIMULATED, highlight=False)
    if not others:
        return
    console.print()
    sources = list(dict.fromkeys(other["source"] for other in others))
    table = new_table("published by others (not simulated)", "model", "mode", "devices", "tokens", "time", "")
    for other in others:
        time = "-" if other["seconds"] is None else format_seconds(other["seconds"])
        number = f"[{sources.index(other['source']) + 1}]"
        table.add_row(other["model"], other["mode"], other["devices"], str(other["tokens"]), time, number)
    print_table(table, console, keys=3)
    console.print(PUBLISHED, highlight=False)
    for place, source in enumerate(sources, start=1):
        console.print(f"[{place}] {source}", highlight=False, soft_wrap=True)


def capacities_to_json(
    rows: Sequence[Capacity], others: Sequence[dict[str, Any]], about: dict[str, Any]
) -> dict[str, Any]:
    """All of it as plain types; which are simulated is said of each."""
    return {
        **about,
        "rows": [{**asdict(row), "simulated": True} for row in rows],
        "published": [{**other, "simulated": False} for other in others],
    }
