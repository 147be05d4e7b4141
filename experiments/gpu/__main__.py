"""All that only a GPU can tell, in one call that keeps to its minutes and goes on where it was stopped.

    python -m evoplan.experiments.gpu [--minutes 9] [--out FOLDER] [--device cpu --small]

Memory of plans against predictions, with expandable segments and without; life under hard caps; plans
against schedules by hand at equal peaks; kernels of attention; copies to the host beside the steps; what of
single steps is off the furthest. Each part is a JSON file in the folder, written after every run; what is
there from the same device, torch and sizes is not run again. Then summary.json and pictures.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import click

from evoplan.cost_model.machine import local_name
from evoplan.experiments.gpu.parts import PARTS, Part, run_part
from evoplan.experiments.gpu.report import draw_all, summarise
from evoplan.experiments.gpu.results import Results
from evoplan.experiments.gpu.setting import Setting
from evoplan.experiments.gpu.worker import run_elsewhere
from evoplan.planner.commands.flags import Number, cache_option
from evoplan.planner.commands.terminal import CHECK_FAILED, run_command
from evoplan.planner.files import make_folder

RESULTS = Path(__file__).parents[1] / "results"
ENDING = 10  # seconds for the summary and the pictures


@click.command(help=__doc__)
@click.option("--minutes", type=Number(0), default=9, show_default=True, help="For all of it.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="Sizes that take seconds on a processor.")
@click.option("--out", type=click.Path(), help="Folder of the results; else experiments/results/gpu-DEVICE.")
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="Parts to run; else all.")
@cache_option
def gpu(
    minutes: float, device: str, small: bool, out: str | None, only: tuple[str, ...], cache: str | None
) -> None:
    """Run the parts; 1 if a run failed."""
    begun = time.monotonic()
    setting = Setting(device, small, cache)
    name = local_name(device)
    folder = make_folder(out or RESULTS / f"gpu-{_slug(name)}")
    left = [name for name in only or PARTS if not _ran(PARTS[name], setting, folder, begun + 60 * minutes)]
    found = {part.name: Results.of(folder, part.name, part.settings(setting)) for part in PARTS.values()}
    found = {name: results for name, results in found.items() if results.rows or results.skipped}
    if found:
        summarise(found, folder / "summary.json")
        draw_all(found, folder)
        click.echo(f"written: {folder}")
    if left:
        click.echo(f"not complete: {', '.join(left)}; the same command goes on from here")
    failed = [f"{name}: {run}" for name, results in found.items() for run in results.failed]
    if failed:
        click.echo(f"failed: {'; '.join(failed)}", err=True)
    sys.exit(CHECK_FAILED if failed else 0)


def _ran(part: Part, setting: Setting, folder: Path, end: float) -> bool:
    """Whether a part is complete, after it has had what time there was."""
    known = Results.of(folder, part.name, part.settings(setting))
    if known.complete and not known.failed:
        click.echo(f"{part.name}: {known.skipped or f'all {len(known.rows)} runs are there'}")
        return True
    seconds = end - ENDING * (not setting.small) - time.monotonic()
    if seconds < (1 if setting.small else part.seconds):
        click.echo(f"{part.name}: skipped: it would not fit the {max(0.0, seconds):.0f} s that are left")
        return False
    # Where there is a driver: an error of its ends a process, and so does an allocator's setting.
    run = run_elsewhere if setting.device == "cuda" else run_part
    return run(part, setting, folder, seconds)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    run_command(gpu, "python -m evoplan.experiments.gpu")
