"""Plans beside everything else that people could use, at equal measured peaks, on this machine.

    python -m evoplan.experiments.peers [--widths small|alphafold2] [--size S,R,BLOCKS] [--only NAME,...]

Each peer runs on the same blocks and inputs, under the same meter; its loss and all gradients are compared
with the plain model's. Then a plan is made for the peak that was measured, and both are timed in turn. What
cannot be run is listed with its reason. Rows are written as they come, so that --resume goes on.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from evoplan.cost_model.machine import local_name
from evoplan.experiments.benchmark import RESULTS, SizeOf
from evoplan.experiments.peers.comparing import Comparison, compare
from evoplan.experiments.peers.registry import all_peers, chosen
from evoplan.experiments.peers.report import draw, line, print_document
from evoplan.experiments.peers.results import Document, Row, resumed
from evoplan.model.config import InputShape
from evoplan.model.families import EvoformerConfig
from evoplan.planner.commands.flags import REPEATS
from evoplan.planner.commands.terminal import console_for_output, progress, run_command
from evoplan.planner.files import STDOUT, check_writable
from evoplan.planner.problems.problem import Mixed, Problem

# (c_m, c_z), and the size that goes with them: s, r, blocks.
WIDTHS = {"small": ((64, 64), (32, 64, 4)), "alphafold2": ((256, 128), (64, 96, 4))}
PRECISIONS = ("fp32", "bf16-mixed")


def problem_of(size: tuple[int, int, int], widths: str, precision: str, device: str) -> Problem:
    """What is trained: AlphaFold 2's main stack without dropout and without an optimizer."""
    (c_m, c_z), (s, r, blocks) = WIDTHS[widths][0], size
    config = EvoformerConfig(n_block=blocks, c_m=c_m, c_z=c_z).with_dropout(0.0)
    mixed: Mixed | None = "bf16-mixed" if precision == "bf16-mixed" else None
    return Problem(
        model="alphafold2", config=config, shape=InputShape(s, r), dtype="float32", device=device,
        optimizer="none", mixed=mixed,
    )  # fmt: skip


@click.command()
@click.option("--size", type=SizeOf(), help="Else the one that goes with the widths.")
@click.option("--widths", type=click.Choice(list(WIDTHS)), default="small", show_default=True,
              help="c=64 at 32,64,4; AlphaFold 2's at 64,96,4.")  # fmt: skip
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option("--rounds", type=REPEATS, default=9, show_default=True, help="Timed runs of each.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--only", help="Names of peers with commas between.")
@click.option("--list", "listing", is_flag=True, help="Say what peers there are, and do nothing.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True,
              help="Offer plans compiled submodules; minutes, the first time.")  # fmt: skip
@click.option("--cache", type=click.Path(), help="File of measured times; else EVOPLAN_CACHE.")
@click.option(
    "--json", "json_path", type=click.Path(), help="Where rows go; else experiments/results/peers-*.json."
)
@click.option("--plot", "plot_path", type=click.Path(), help="Where the picture goes; else beside the JSON.")
@click.option("--resume", is_flag=True, help="Keep the rows that the JSON has, and make the others.")
def peers(
    size: tuple[int, int, int] | None, widths: str, precision: str, rounds: int, device: str,
    only: str | None, listing: bool, compiled: bool, cache: str | None, json_path: str | None,
    plot_path: str | None, resume: bool,
) -> None:  # fmt: skip
    """Plans against their peers, at equal measured peaks."""
    console = console_for_output(120, json_path)
    if listing:
        for peer in all_peers().values():
            unit = f" (budget in {peer.unit})" if peer.unit else ""
            console.print(f"{peer.name}: {peer.about}{unit}. {peer.source}", soft_wrap=True, highlight=False)
        return
    wanted = chosen(None if only is None else [name.strip() for name in only.split(",")])
    if json_path == STDOUT:
        raise ValueError("rows are written as they come: --json wants a file")
    s, r, blocks = size or WIDTHS[widths][1]
    path = Path(json_path) if json_path else RESULTS / f"peers-{widths}-{precision}-{device}.json"
    picture = Path(plot_path) if plot_path else path.with_suffix(".png")
    check_writable(picture, json_path=path, reads=(cache,))
    fresh = Document(
        torch=torch.__version__, device=local_name(device), blocks=blocks, s=s, r=r, widths=widths,
        precision=precision, rounds=rounds,
    )  # fmt: skip
    document = resumed(path, fresh) if resume else fresh

    with progress("measuring the steps") as say:
        problem = problem_of((s, r, blocks), widths, precision, device)
        comparison = Comparison(problem, cache, rounds, say, compiled=compiled)

        def shown(row: Row) -> None:
            document.write(path)
            say.done(line(row))

        compare(document, comparison, wanted, shown)
    document.write(path)
    print_document(document, console)
    draw(document, picture)


if __name__ == "__main__":
    run_command(peers, "python -m evoplan.experiments.peers")
