"""`evoplan roofline`: tables that fit the terminal, one product, its network roofline, and the picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evoplan.cost_model.devices import Link, device
from evoplan.cost_model.matmul import Matmul, split
from evoplan.planner.reports.labels import Label, place_labels
from evoplan.planner.reports.plot import plt
from evoplan.planner.reports.plot_roofline import Point, draw_roofline
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import format_rate
from tests.test_cli import call

TPU = str(Path(__file__).parents[1] / "examples" / "tpu-v5e.json")
SIZES = ["--n-blocks", "2", "--n-seq", "16", "--n-res", "24"]


def lines_of_figures(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d[\d.,]*(?![\w.])", text))


@pytest.mark.parametrize("more", [[], ["--every"], ["--ranks", "2"]])
def test_at_80_columns_every_figure_is_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    _, wide, _ = call(capsys, "roofline", *SIZES, *more)
    monkeypatch.setenv("COLUMNS", "80")
    code, narrow, _ = call(capsys, "roofline", *SIZES, *more)
    assert code == 0
    assert max(map(len, narrow.splitlines())) <= 80
    assert lines_of_figures(narrow) == lines_of_figures(wide)
    assert narrow.count("roofline (times in ms)") > 1  # in parts, each with its keys
    assert narrow.count("triangle_outgoing") == narrow.count("roofline (times in ms)")


def test_a_table_that_fits_is_printed_in_one() -> None:
    table = new_table("a title", "name", "one", "two")
    table.add_row("first", "1", "2")
    console = Console(width=40, record=True)
    print_table(table, console)
    assert console.export_text().count("a title") == 1


def test_cells_of_several_words_are_whole_too() -> None:
    cells = ["outer_product_mean", "coshard(channel, 2)", "-0.0902 ms", "+66.04 MiB", "does not fit"]
    table = new_table("what else", "submodule", "strategy", "step time", "peak", "")
    table.add_row(*cells)
    for width in (80, 60, 45):
        console = Console(width=width, record=True)
        print_table(table, console)
        printed = console.export_text()
        assert all(cell in printed for cell in cells), width


def test_blocks_with_other_work_are_named_and_those_with_the_same_are_printed_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, printed, _ = call(
        capsys, "roofline", "--model", "tiny-openfold", "--n-seq", "3", "--n-res", "5", "--batch", "1"
    )
    assert printed.count("outer_product_mean") == 1
    sizes = ("--n-blocks", "3", "--n-seq", "3", "--n-res", "5")
    _, printed, _ = call(capsys, "roofline", "--model", "msa-module-4", *sizes)
    rows = [line.split("  ")[0].strip() for line in printed.splitlines() if "forward" in line]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize(
    ("rate", "said"),
    [(3.21e7, "32.1 MFLOP/s"), (80e9, "80 GFLOP/s"), (9.89e14, "989 TFLOP/s"), (5.0, "5 FLOP/s")],
)
def test_rates_have_units_that_fit(rate: float, said: str) -> None:
    assert format_rate(rate) == said


# --- one product ----------------------------------------------------------------------------


def test_the_intensity_of_a_product_is_flops_over_operands_and_result() -> None:
    """By hand: 2 x 3 x 5 x 7 FLOPs, 2 (15 + 35 + 21) bytes."""
    product = Matmul(3, 5, 7, 2)
    assert (product.flops, product.bytes) == (210, 142)
    assert product.intensity == 210 / 142


def test_the_least_batch_is_where_the_bound_changes() -> None:
    found = device("h100-80gb")
    product = Matmul(1, 4096, 1024, 2)
    least = product.least_batch(found, "bfloat16")
    assert least is not None
    assert replace(product, b=least).bounds(found, "bfloat16").bound == "compute"
    assert replace(product, b=least - 1).bounds(found, "bfloat16").bound == "memory"
    small = Matmul(1, 64, 64, 2)  # intensity stays below 64 / 2 at any b
    assert small.least_batch(found, "bfloat16") is None
    assert replace(small, b=10**9).bounds(found, "bfloat16").bound == "memory"


def test_two_devices_send_each_other_one_partial_result() -> None:
    """Compute takes longer from D = 2 peak / bandwidth on, in half precision and without latency."""
    found = device("a100-40gb")
    link = Link(bandwidth=1e11, latency=0.0)
    product = Matmul(256, 8192, 512, 2)
    halves = split(product, 2, found, "bfloat16", link)
    assert halves.comms_seconds == 2 * 256 * 512 / 1e11
    assert halves.math_seconds == halves.whole_seconds / 2
    assert halves.least_d == 2 * 3.12e14 / 1e11
    for d, bound in ((halves.least_d, "compute"), (halves.least_d - 1, "communication")):
        assert split(replace(product, d=d), 2, found, "bfloat16", link).bound == bound
    four = split(product, 4, found, "bfloat16", link)
    assert four.least_d == 3 * halves.least_d  # a ring: 2 (n - 1) / n of it, and a quarter of the work
    with pytest.raises(ValueError, match="not 9000"):
        split(product, 9000, found, "bfloat16", link)


def test_the_command_says_240_for_a_tpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, picture = tmp_path / "found.json", tmp_path / "roof.svg"
    asked = ["--device", TPU, "--dtype", "bfloat16", "--split", "2", "--plot", str(picture)]
    code, printed, _ = call(capsys, "roofline", "--matmul", "200,65536,65536", *asked, "--json", str(path))
    assert code == 0
    assert "B = 240 where D and F are large" in printed
    document = json.loads(path.read_text())
    assert document["bound"] == "memory"
    assert 240 <= document["least_batch"] <= 243
    assert document["split"]["devices"] == 2
    assert document["split"]["least_d"] == 8756  # 2 x 1.97e14 / 4.5e10, rounded up
    assert picture.stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--matmul", "1,2"], "B, D and F"),
        (["--matmul", "1,2,0"], "B, D and F"),
        (["--split", "2"], "add --matmul"),
        (["--matmul", "8,8,8", "--n-res", "9"], "leave --n-res out"),
        (["--matmul", "8,8,8", "--split", "9"], "not 9"),
        (["--matmul", "8,8,8", "--plot", "roof.bmp"], "png, svg or pdf"),
        (["--host-memory", "1GiB"], "No such option"),
        (["--reserve", "1GiB"], "No such option"),
        (["--optimizer", "sgd"], "No such option"),
    ],
)
def test_flags_that_say_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    code, _, errors = call(capsys, "roofline", *flags)
    assert code == 2
    assert said in errors
    assert errors.count("\n") == 1


# --- labels ---------------------------------------------------------------------------------


def assert_legible(axes, notes) -> None:
    """All inside the frame, none on another or on the legend."""
    axes.figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in notes]
    frame = axes.get_window_extent()
    others = [axes.get_legend().get_window_extent()] if axes.get_legend() else []
    for number, box in enumerate(boxes):
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in [*boxes[:number], *others])


def test_labels_of_near_points_and_of_points_at_the_frame() -> None:
    figure, axes = plt.subplots(figsize=(5, 3))
    points = [(1, 1), (1, 1.01), (1.01, 1), (5, 5), (5, 1), (1, 5), (4.99, 5)]
    axes.plot(*zip(*points, strict=True), "o", label="points")
    axes.set_xlim(1, 5)
    axes.set_ylim(1, 5)
    axes.legend()
    notes = place_labels(axes, [Label(f"label {n}", x, y) for n, (x, y) in enumerate(points)])
    assert len(notes) == len(points)
    assert_legible(axes, notes)
    plt.close(figure)


def test_the_picture_has_points_on_the_roof_and_every_name() -> None:
    found = device("h100-80gb")
    sizes = [(n, 4096, 512 * n) for n in (1, 2, 3, 64, 65, 900, 901)]
    points = [Point(f"product {b}", Matmul(b, d, f, 2).bounds(found, "bfloat16")) for b, d, f in sizes]
    figure = draw_roofline(points, found, "bfloat16", "products")
    (axes,) = figure.axes
    assert {note.get_text() for note in axes.texts} == {point.name for point in points}
    assert_legible(axes, axes.texts)
    (marked,) = (line for line in axes.lines if line.get_label() == "forward, on the roof")
    for point, x, y in zip(points, marked.get_xdata(), marked.get_ydata(), strict=True):
        assert x == point.bounds.intensity
        assert y == pytest.approx(point.bounds.flops / point.bounds.lower_seconds)
    plt.close(figure)
