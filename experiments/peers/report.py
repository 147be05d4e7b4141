"""The comparison as a table, as lines and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from evoplan.experiments.peers.results import Document, Row
from evoplan.planner.reports.tables import new_table

MIB = 2**20
COLOURS = {"hand": "tab:red", "automatic": "tab:orange", "ours": "tab:blue"}


def mib(size: int | None) -> str:
    """Bytes in MiB."""
    return "-" if size is None else f"{size / MIB:.1f}"


def line(row: Row) -> str:
    """A finished row in a line."""
    if row.peak_bytes is None:
        return f"{row.label}: {row.status}: {row.reason}"
    said = f"{row.label}: {mib(row.peak_bytes)} MiB"
    if row.seconds is not None:
        said += f", {row.seconds.median:.3f} s ({row.seconds.least:.3f}-{row.seconds.most:.3f})"
    if row.ours is not None:
        said += f"; plan {'none' if row.ours.ratio is None else format(row.ours.ratio, '.3f')} of its time"
    return said if row.status == "ok" else f"{said}; {row.status}: {row.reason}"


def print_document(document: Document, console: Console) -> None:
    """All rows, the least peaks, and what failed."""
    title = (
        f"{document.blocks} blocks, s={document.s}, r={document.r}, {document.widths} widths, "
        f"{document.precision}, {document.rounds} rounds; MiB above {mib(document.static_bytes)} static"
    )
    table = new_table(
        title,
        "peer",
        "asked",
        "peak",
        "seconds",
        "least-most",
        "plan's peak",
        "plan's seconds",
        "plan / peer",
    )
    for row in document.rows:
        if row.peak_bytes is not None:
            table.add_row(*_cells(row))
    console.print(table)
    for row in document.rows:
        if row.status != "ok":
            console.print(f"{row.label}: {row.status}: {row.reason}", soft_wrap=True)
    for about, least in leasts(document).items():
        if least is not None:
            console.print(f"least {about}: {mib(least.peak_bytes)} MiB ({least.label})")


def _cells(row: Row) -> list[str]:
    times, ours = row.seconds, row.ours
    cells = [row.label, mib(row.asked_bytes), mib(row.peak_bytes)]
    cells += ["-", "-"] if times is None else [f"{times.median:.3f}", f"{times.least:.3f}-{times.most:.3f}"]
    if ours is None:
        return [*cells, "", "", ""]
    cells.append(mib(ours.peak_bytes) if ours.reason is None else "none fits")
    cells.append("-" if ours.seconds is None else f"{ours.seconds.median:.3f}")
    return [*cells, "-" if ours.ratio is None else f"{ours.ratio:.3f}"]


def leasts(document: Document) -> dict[str, Row | None]:
    """The row of the least peak by hand, of programs, and of plans; wrong ones do not count."""
    kinds = {"by hand": "hand", "automatic": "automatic", "of plans": "ours"}
    found = {}
    for about, kind in kinds.items():
        right = [row for row in document.rows if (row.kind, row.status) == (kind, "ok")]
        found[about] = min(right, key=lambda row: row.peak_bytes or 0, default=None)
    return found


def draw(document: Document, path: Path) -> None:
    """Peak against time, and what was asked for against what was measured."""
    from evoplan.planner.reports.labels import Label, place_labels
    from evoplan.planner.reports.plot import plt, save_figure

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.5))
    labels: list[Label] = []
    right_rows = [row for row in document.rows if row.status == "ok" and row.peak_bytes]
    for row in right_rows:
        assert row.peak_bytes is not None
        if row.seconds is not None:
            left.plot(row.peak_bytes / MIB, row.seconds.median, "o" if row.kind == "ours" else "x",
                      color=COLOURS[row.kind])  # fmt: skip
            labels.append(Label(row.label, row.peak_bytes / MIB, row.seconds.median))
        if row.ours is not None and row.ours.seconds is not None and row.ours.peak_bytes is not None:
            left.plot(
                row.ours.peak_bytes / MIB, row.ours.seconds.median, ".", color=COLOURS["ours"], alpha=0.6
            )
    left.set(xscale="log", xlabel="measured peak above static, MiB", ylabel="seconds a step (median)",
             title="peers: x by hand (red), by programs (orange); plans: blue")  # fmt: skip
    _asked(right, right_rows)
    figure.suptitle(
        f"{document.blocks} blocks, s={document.s}, r={document.r}, {document.widths} widths, "
        f"{document.precision}, {document.device}", fontsize=9,
    )  # fmt: skip
    left.set(yscale="log")
    figure.tight_layout()
    place_labels(left, labels, size=6)
    save_figure(figure, path)


def _asked(panel: object, rows: list[Row]) -> None:
    """Budgets on one axis, peaks on the other: on the diagonal a budget is what is taken."""
    names = dict.fromkeys(row.name for row in rows if row.asked_bytes)
    ends = [size / MIB for row in rows if row.asked_bytes for size in (row.asked_bytes, row.peak_bytes or 1)]
    if ends:
        panel.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", linewidth=0.8)  # type: ignore[attr-defined]
    for name in names:
        points = sorted(
            (row.asked_bytes / MIB, (row.peak_bytes or 0) / MIB)
            for row in rows if row.name == name and row.asked_bytes
        )  # fmt: skip
        style = {"linewidth": 2.5, "color": COLOURS["ours"]} if name == "evoplan" else {"linewidth": 1}
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)  # type: ignore[attr-defined]
    panel.set(xscale="log", yscale="log", xlabel="peak asked for, MiB (fractions: of the plain peak)",  # type: ignore[attr-defined]
              ylabel="peak measured, MiB", title="asked for and measured")  # fmt: skip
    if names:
        panel.legend(fontsize=7)  # type: ignore[attr-defined]
