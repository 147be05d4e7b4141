"""All parts in a page of figures and a few pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoplan.experiments.benchmark_report import draw as draw_benchmark
from evoplan.experiments.gpu.results import Results
from evoplan.experiments.gpu.setting import Row
from evoplan.planner.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 12  # residues that the summary lists
RATIOS = ("ratio", "allocated_over_predicted", "reserved_over_predicted")
Found = Mapping[str, Results]


def summarise(found: Found, path: Path) -> None:
    """Write what is to be read first: ranges of the ratios, and what is off the furthest."""
    fidelity = {name: results for name, results in found.items() if name.startswith("fidelity")}
    write_json(
        path,
        {
            **next(iter(found.values())).settings,
            "skipped": {name: results.skipped for name, results in found.items() if results.skipped},
            "failed": {name: results.failed for name, results in found.items() if results.failed},
            "fidelity": {name: _ranges(results.rows) for name, results in fidelity.items() if results.rows},
            "caps": {
                f"{name}: {run}": row["cap_over_predicted"]
                for name, results in found.items()
                for run, row in results.rows.items()
                if "cap_over_predicted" in row
            },
            "largest_residues_of_plans": _largest(_plans(fidelity)),
            "largest_residues_of_steps": _largest(_steps(found)),
        },
    )


def _ranges(rows: Mapping[str, Row]) -> Row:
    """Least and largest of each ratio."""
    ranges = {}
    for name in RATIOS:
        values = [row[name] for row in rows.values() if row.get(name) is not None]
        if values:
            ranges[name] = [min(values), max(values)]
    return {"plans": len(rows), **ranges}


def _plans(fidelity: Found) -> Iterator[Row]:
    for name, results in fidelity.items():
        for run, row in results.rows.items():
            if row.get("ratio") is not None:
                residue = row["measured_peak_bytes"] - row["predicted_peak_bytes"]
                yield {"run": f"{name}: {run}", "residue_bytes": residue, "residue": row["ratio"] - 1}


def _steps(found: Found) -> Iterator[Row]:
    for row in found["residues"].rows.values() if "residues" in found else ():
        for phase in row.get("phases", ()):
            yield {"step": row["step"], "precision": row["precision"], **phase}


def _largest(rows: Iterator[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -abs(row["residue_bytes"]))[:MOST]


def draw_all(found: Found, folder: Path) -> None:
    """Pictures of those parts that are there."""
    from evoplan.planner.reports.plot import save_figure

    fidelity = {
        name: rows
        for name, results in found.items()
        if name.startswith("fidelity") and (rows := _good(results))
    }
    if fidelity:
        save_figure(_draw_fidelity(fidelity), folder / "fidelity.png")
    if "against" in found and (rows := _good(found["against"])):
        device = found["against"].settings["device"]
        save_figure(draw_benchmark({"device": device, "sizes": list(rows.values())}), folder / "against.png")
    if "kernels" in found and (rows := _good(found["kernels"])):
        save_figure(_draw_bars(_kernel_bars(rows), "step time by kernel, ms"), folder / "kernels.png")
    if "offload" in found and (rows := _good(found["offload"])):
        save_figure(_draw_bars(_offload_bars(rows), "step time with state away, ms"), folder / "offload.png")


def _good(results: Results) -> dict[str, Row]:
    return {run: row for run, row in results.rows.items() if "error" not in row}


def _draw_fidelity(parts: Mapping[str, Mapping[str, Row]]) -> Figure:
    """Measured over predicted against the predicted peak: activations, and reserved of the process."""
    from matplotlib.ticker import ScalarFormatter

    from evoplan.planner.reports.plot import plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for index, (name, rows) in enumerate(parts.items()):
        for key, marker in (("ratio", "o"), ("reserved_over_predicted", "x")):
            points = [
                (row["predicted_peak_bytes"] / 2**20, row[key])
                for row in rows.values()
                if row.get(key) is not None
            ]
            if points:
                what = "activations" if key == "ratio" else "reserved"
                label = f"{name.removeprefix('fidelity-')}, {what}"
                axes.plot(
                    *zip(*points, strict=True), marker, color=f"C{index}", label=label, fillstyle="none"
                )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("predicted peak, MiB")
    axes.set_ylabel("measured / predicted")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _kernel_bars(rows: Mapping[str, Row]) -> dict[str, float]:
    return {run: 1e3 * sum(row["seconds"].values()) for run, row in rows.items() if "seconds" in row}


def _offload_bars(rows: Mapping[str, Row]) -> dict[str, float]:
    return {
        f"{run}, {name}": 1e3 * one["seconds"]
        for run, row in rows.items()
        for name, one in row["runs"].items()
    }


def _draw_bars(bars: Mapping[str, float], label: str) -> Figure:
    from evoplan.planner.reports.plot import plt

    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(bars)), constrained_layout=True)
    names: list[Any] = list(bars)
    axes.barh(names[::-1], [bars[name] for name in names[::-1]], color="tab:blue")
    axes.set_xlabel(label)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.3, axis="x")
    return figure
