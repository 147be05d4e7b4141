"""`evoplan fit-table`: the most residues that fit on devices, and the time of a step."""

from __future__ import annotations

from typing import Any

import click

from evoplan.cost_model.devices import DEVICES, DTYPES
from evoplan.model.families import PRESETS, preset
from evoplan.planner.commands.flags import json_option
from evoplan.planner.commands.terminal import console_for_output, progress
from evoplan.planner.files import check_writable, write_json

MODELS = ("pairformer-48", "alphafold2-finetune")
# One of each memory: 16, 24, 40, 80 and 141 GiB.
ON = ("v100-16gb", "rtx4090-24gb", "a100-40gb", "h100-80gb", "h200-141gb")
MODES = ("training", "inference")
MOST_RANKS = 64
KNOWN = [name for name, device in DEVICES.items() if device.memory_bytes is not None]


class _Ranks(click.ParamType[tuple[int, ...]]):
    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() and 1 <= int(part) <= MOST_RANKS for part in parts):
            self.fail(f"{value!r}: give numbers of ranks from 1 to {MOST_RANKS}, like 1,8,64", param, ctx)
        return tuple(dict.fromkeys(map(int, parts)))


@click.command("fit-table")
@click.option(
    "--model",
    "models",
    multiple=True,
    default=MODELS,
    show_default=True,
    metavar="PRESET",
    help=f"May be given often; all, or any of: {', '.join(PRESETS)}.",
)
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), default=MODES, show_default=True)
@click.option("--ranks", type=_Ranks(), default="1", show_default=True, help="Devices that share an input.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    type=click.Choice(KNOWN),
    metavar="DEVICE",
    default=ON,
    show_default=True,
    help="May be given often; of the device table.",
)
@click.option("--n-seq", type=click.IntRange(1), help="Rows of the alignment; else each preset's own.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--step", type=click.IntRange(1, 4096), default=32, show_default=True, help="Residues apart.")
@json_option
def fit_table(
    models: tuple[str, ...],
    modes: tuple[str, ...],
    ranks: tuple[int, ...],
    devices: tuple[str, ...],
    n_seq: int | None,
    dtype: str,
    step: int,
    json_path: str | None,
) -> None:
    """The most residues (or tokens) that fit on devices, with the time of a step, beside published figures.

    Searched by bisection over residues with the planner's least peak: simulated, of the stack alone. A row
    takes a minute or two in training, half of one in inference.
    """  # fmt: skip
    check_writable(json_path=json_path)
    for name in models:
        if name != "all":
            preset(name)  # a wrong name is said before the work
    from evoplan.planner.plans.capacity import Asked, capacities, distinct_presets, published
    from evoplan.planner.reports.capacity import capacities_to_json, in_words, print_capacities

    names = dict.fromkeys(distinct_presets() if "all" in models else models)
    rows = []
    with progress("searching") as say:
        for name in names:
            for mode in modes:
                for count in ranks:
                    say(f"searching {name}, {mode}, {count} ranks")
                    asked = Asked(name, mode, count, {"dtype": dtype}, n_seq, step)  # type: ignore[arg-type]
                    for row in capacities(asked, list(dict.fromkeys(devices))):
                        rows.append(row)
                        say.done(in_words(row))
    others = [other for other in published() if other["mode"] in modes]
    if json_path:
        about = {"dtype": dtype, "n_seq": n_seq, "step": step}
        write_json(json_path, capacities_to_json(rows, others, about))
    print_capacities(rows, others, console_for_output(json_path=json_path))
