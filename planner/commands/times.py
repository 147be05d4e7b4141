"""`evoplan profile`: what each step takes here."""

from __future__ import annotations

from typing import Any

import click

from evoplan.planner.commands.flags import (
    REPEATS,
    cache_option,
    files_read,
    json_option,
    problem_of,
    problem_options,
)
from evoplan.planner.commands.terminal import console_for_output, progress
from evoplan.planner.files import check_writable, write_json


@click.command()
@problem_options
@click.option("--repeats", type=REPEATS, default=3, show_default=True, help="Timed runs; medians count.")
@click.option("--max-pieces", type=click.IntRange(1), help="Leave out strategies of more pieces.")
@click.option("--again", is_flag=True, help="Also measure what the cache has.")
@click.option("--compile", "compiled", is_flag=True, help="Also try torch.compile on each submodule.")
@cache_option
@click.option(
    "--save-device", type=click.Path(), help="Write this device with the fitted rates, as NAME-calibrated."
)
@json_option
def profile(
    repeats: int,
    max_pieces: int | None,
    again: bool,
    compiled: bool,
    cache: str | None,
    save_device: str | None,
    json_path: str | None,
    **flags: Any,
) -> None:
    """Measure the times of every step under every strategy here, for `plan --times`."""
    check_writable(save_device, json_path=json_path, reads=files_read(cache, **flags))
    problem = problem_of(**flags)
    from evoplan.planner.checking.profiling import profile_problem
    from evoplan.planner.reports.times import print_profile, profile_to_json

    with progress("loading torch") as update:
        measured, calibration, device = profile_problem(
            problem, cache, repeats, max_pieces, again, compiled, update, update.done
        )
    if save_device:
        from evoplan.planner.problems.device_file import device_entry

        write_json(
            save_device, device_entry(calibration.described(device, problem.autocast or problem.dtype))
        )
    if json_path:
        write_json(json_path, profile_to_json(problem, measured, calibration))
    console = console_for_output(json_path=json_path)
    print_profile(measured, calibration, console)
    if save_device:
        console.print(f"calibrated device written to {save_device}", highlight=False, soft_wrap=True)
