"""The benchmark's figures as tables and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import format_seconds, format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _title(found: dict[str, Any]) -> str:
    compiled = ", torch.compile" if found.get("compiled") else ""
    return f"{found['blocks']} blocks, s={found['s']}, r={found['r']}, {found['dtype']}{compiled}"


def print_size(found: dict[str, Any], console: Console) -> None:
    """Runs, and how plans compare."""
    table = new_table(_title(found), "run", "peak", "step time", "quartiles", "predicted")
    for name, row in found["runs"].items():
        low, high = row["quartiles"]
        table.add_row(
            name,
            format_size(row["peak_bytes"]),
            format_seconds(row["seconds"]),
            f"{low:.3f}-{high:.3f} s",
            format_seconds(row["predicted_seconds"]),
        )
    print_table(table, console)
    table = new_table("plans against schedules by hand", "plan", "time", "quartiles", "peak")
    for row in found["comparisons"]:
        low, high = row["quartiles"]
        table.add_row(
            f"{row['plan']} / {row['against']}",
            f"{row['time_ratio']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['peak_ratio']:.3f}",
        )
    print_table(table, console)


def draw(document: dict[str, Any]) -> Figure:
    """Peak against time: a panel for each size."""
    from matplotlib.ticker import ScalarFormatter

    from evoplan.planner.reports.labels import Label, place_labels
    from evoplan.planner.reports.plot import plt

    sizes = document["sizes"]
    rows, columns = -(-len(sizes) // 2), min(2, len(sizes))
    figure, panels = plt.subplots(rows, columns, figsize=(5.5 * columns, 4 * rows), squeeze=False)
    for panel in panels.flat[len(sizes) :]:
        panel.remove()
    texts = {}
    for panel, found in zip(panels.flat, sizes, strict=False):
        labels = []
        for name, row in found["runs"].items():
            planned = name.startswith("plan")
            style = {"marker": "o", "color": "tab:blue"} if planned else {"marker": "x", "color": "tab:red"}
            peak = row["peak_bytes"] / 2**20
            panel.plot(peak, row["seconds"], linestyle="none", **style)
            if not planned:
                labels.append(Label(name, peak, row["seconds"]))
        panel.margins(x=0.1, y=0.1)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.set_xlabel("measured peak, MiB")
        panel.set_ylabel("measured step time, s")
        panel.set_title(_title(found), fontsize=9)
        texts[panel] = labels
    panels[0][0].plot([], [], "o", color="tab:blue", label="planned for the same peak")
    panels[0][0].plot([], [], "x", color="tab:red", label="by hand")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(document["device"], fontsize=9)
    figure.tight_layout()
    for panel, labels in texts.items():
        place_labels(panel, labels, size=7)
    return figure
