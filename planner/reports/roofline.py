"""The roofline as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from evoplan.cost_model.roofline import balance
from evoplan.planner.plans.roofline import Row
from evoplan.planner.problems.costing import Costed
from evoplan.planner.reports.tables import describe_problem, new_table, print_table
from evoplan.planner.sizes import format_rate


def print_roofline(rows: list[Row], costed: Costed, console: Console) -> None:
    """A line for each row, and the device's own figures."""
    device, dtype = costed.device, costed.problem.precision
    console.print(describe_problem(costed.problem), highlight=False)
    strategies = any(str(row.strategy) != "whole" for row in rows)
    sends = any(row.bounds.sent_bytes for row in rows)
    table = new_table(
        "roofline (times in ms)", "submodule", *(["strategy"] if strategies else []), "phase", "GFLOP", "GB",
        "kernels", "FLOP/B", "bound", "math", "memory", *(["comms"] if sends else []), "lower", "predicted",
        "upper",
    )  # fmt: skip
    last: tuple[str, str] | None = None
    for row in rows:
        found, name = row.bounds, (row.label, str(row.strategy))
        times = (
            found.math_seconds, found.memory_seconds, *([found.comms_seconds] if sends else []),
            found.lower_seconds, found.predicted_seconds, found.upper_seconds,
        )  # fmt: skip
        table.add_row(
            "" if last and last[0] == name[0] else name[0],
            *([] if not strategies else ["" if last == name else name[1]]),
            row.phase,
            _short(found.flops / 1e9),
            _short(found.bytes / 1e9),
            str(found.launches),
            _short(found.intensity),
            found.bound,
            *(_short(time * 1e3) for time in times),
        )
        last = name
    print_table(table, console, keys=3 if strategies else 2)
    console.print(
        f"{device.name}: {format_rate(device.peak_flops[dtype])} in {dtype}, "
        f"{device.bandwidth / 1e9:g} GB/s, so bound by arithmetic above {balance(device, dtype):.0f} FLOP/B; "
        f"{device.launch_seconds * 1e6:g} us a kernel ({device.source})",
        highlight=False,
    )
    console.print("lower: everything overlaps; upper: nothing does; predicted: each kernel at its bottleneck")


def _short(value: float) -> str:
    """Three digits, and no exponent for what people see."""
    return "-" if value == 0 else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def roofline_to_json(rows: list[Row], costed: Costed) -> dict[str, Any]:
    """All of it as plain types."""
    device, dtype = costed.device, costed.problem.precision
    return {
        "problem": costed.problem.model_dump(mode="json"),
        "device": {
            "name": device.name,
            "peak_flops": device.peak_flops[dtype],
            "bandwidth": device.bandwidth,
            "launch_seconds": device.launch_seconds,
            "balance": balance(device, dtype),
            "source": device.source,
        },
        "rows": [
            {
                "submodule": row.submodule,
                "blocks": row.blocks,
                "strategy": str(row.strategy),
                "phase": row.phase,
                **asdict(row.bounds),
                "intensity": row.bounds.intensity,
                "lower_seconds": row.bounds.lower_seconds,
                "upper_seconds": row.bounds.upper_seconds,
                "bound": row.bounds.bound,
            }
            for row in rows
        ],
    }
