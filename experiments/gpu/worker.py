"""One part in a process of its own: for an allocator's setting, a cap, or a driver's error that stays in it.

    python -m evoplan.experiments.gpu.worker PART FOLDER --device cuda [--small] --seconds N

Started by `python -m evoplan.experiments.gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from evoplan.experiments.gpu.parts import PARTS, Part, run_part
from evoplan.experiments.gpu.setting import Setting
from evoplan.planner.commands.flags import cache_option
from evoplan.planner.commands.terminal import CHECK_FAILED, run_command

STARTING = 12  # seconds until a process has torch and a driver: its runs have the rest


def run_elsewhere(part: Part, setting: Setting, folder: Path, seconds: float) -> bool:
    """`run_part` in a process of its own, which is ended when the time is over; what it has done is kept."""
    command = [sys.executable, "-m", "evoplan.experiments.gpu.worker", part.name, str(folder)]
    command += ["--device", setting.device, "--seconds", str(max(0.0, seconds - STARTING))]
    command += ["--small"] * setting.small
    command += ["--cache", setting.cache] if setting.cache else []
    conf = f"expandable_segments:{part.expandable}"
    # torch 2.9 knows the first name, later ones prefer the second.
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": conf, "PYTORCH_ALLOC_CONF": conf}
    try:
        code = subprocess.run(command, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        click.echo(f"{part.name}: ended when the time was over; the run that it was at is lost")
        return False
    if code not in (0, CHECK_FAILED):
        click.echo(f"{part.name}: its process ended with {code}; the run that it was at is lost")
    return code == 0


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(list(PARTS)), metavar="PART")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), required=True)
@click.option("--small", is_flag=True)
@click.option("--seconds", type=float, required=True)
@cache_option
def worker(name: str, folder: Path, device: str, small: bool, seconds: float, cache: str | None) -> None:
    """Run it; 1 if the time was not enough."""
    done = run_part(PARTS[name], Setting(device, small, cache), folder, seconds)
    sys.exit(0 if done else CHECK_FAILED)


if __name__ == "__main__":
    run_command(worker, "python -m evoplan.experiments.gpu.worker")
