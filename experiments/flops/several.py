"""Several devices at once, each profiled by a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from evoplan.experiments.flops.documents import several_document
from evoplan.experiments.flops.output import print_several
from evoplan.experiments.flops.single import PROFILE, recipe_of
from evoplan.planner.commands.terminal import CHECK_FAILED, progress
from evoplan.planner.errors import RunError
from evoplan.planner.files import write_json

SEVERAL = "flops_profile_multi_gpu.json"


def profile_several(
    folder: Path, devices: str | None, num_steps: int, sizes: Mapping[str, int], wanted: Iterable[str]
) -> bool:
    """Each device in a process of its own: the first alone, then all at once.

    Args:
        devices: numbers with commas between; None for all GPUs.
        wanted: analyses besides, by the names of their flags; each device's lie in its own folder.

    Returns:
        Whether the counters agree everywhere.
    """
    gpus = torch.cuda.device_count()
    names = [str(number) for number in range(gpus)] if devices is None else _numbers(devices)
    if not names:
        raise ValueError("--multi-gpu: no GPU here; give --devices 0,1 to let processes share the cores")
    wrong = [name for name in names if gpus and int(name) >= gpus]
    if wrong:
        raise ValueError(f"--devices {','.join(wrong)}: this machine has {gpus} GPUs, numbered from 0")
    if not gpus:
        click.echo(f"No GPU here: {len(names)} processes share the cores.")
    threads = max(1, (os.cpu_count() or 1) // len(names))
    flags = {**sizes, "num_steps": num_steps}
    arguments = [part for name, n in flags.items() for part in (f"--{name.replace('_', '-')}", str(n))]
    arguments += [f"--{name}" for name in wanted]

    def start(name: str, where: Path) -> subprocess.Popen[str]:
        own = ["--device", name if gpus else "cpu", "--output-dir", str(where)]
        environment = os.environ | ({} if gpus else {"OMP_NUM_THREADS": str(threads)})
        return subprocess.Popen(
            [sys.executable, "-m", "evoplan.experiments.flops", *arguments, *own],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    agree = True

    def finish(process: subprocess.Popen[str], name: str, where: Path) -> Any:
        nonlocal agree
        _, errors = process.communicate()
        agree = agree and process.returncode == 0
        if process.returncode not in (0, CHECK_FAILED):
            last = (errors.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"device {name}: {last}")
        return json.loads((where / PROFILE).read_text(encoding="utf-8"))

    with progress(f"device {names[0]} alone") as update:
        where = folder / "alone"
        alone = finish(start(names[0], where), names[0], where)
        update.done(f"device {names[0]} alone: done")
        update(f"devices {', '.join(names)} at once")
        folders = [folder / f"gpu_{name}" for name in names]
        running = [start(name, where) for name, where in zip(names, folders, strict=True)]
        together = [finish(*each) for each in zip(running, names, folders, strict=True)]
        update.done(f"devices {', '.join(names)} at once: done")
    document = several_document(recipe_of(**sizes), names, alone, together)
    write_json(folder / SEVERAL, document)
    print_several(document)
    click.echo(f"\n   Results saved to: {folder / SEVERAL}")
    return agree


def _numbers(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(name.isdecimal() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"--devices {text!r}: give different numbers of GPUs with commas between, as 0,1")
    return names
