"""Plans against what people do by hand, at equal measured peaks, on this machine.

    python -m evoplan.experiments.benchmark [--size S,R,BLOCKS ...] [--rounds N] [--device cuda]

By hand: `none`, `sqrt`, `small` and `large` with attention as the formula is written, and the last two
again with each step's fastest kernel (`+kernels`). Each is run and its peak measured; then a plan is made
for exactly that many bytes, and one more for half of what `large` takes. All of them run interleaved in one
process; the ratios are of medians, with the quartiles of the ratios by round.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from evoplan.cost_model import measure
from evoplan.cost_model.machine import local_name
from evoplan.experiments.benchmark_report import draw, print_size
from evoplan.experiments.interleaved import interleaved
from evoplan.experiments.strategies import last_choices
from evoplan.model.config import InputShape
from evoplan.model.families import EvoformerConfig
from evoplan.planner.checking.profiling import profile_problem
from evoplan.planner.checking.trial import Trial, random_inputs, random_stack
from evoplan.planner.commands.flags import REPEATS
from evoplan.planner.commands.terminal import Progress, console_for_output, progress, run_command
from evoplan.planner.execution.applying import apply_plan
from evoplan.planner.files import STDOUT, check_writable, write_json
from evoplan.planner.plans.plan import Plan, SolverReport
from evoplan.planner.plans.planning import NoPlanError, plan_of, solve
from evoplan.planner.problems.costing import Costed
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import cost_with_times
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.sizes import format_size
from evoplan.planner.solvers.baselines import (
    every_block,
    every_submodule,
    fastest_kernels,
    keep_everything,
    square_root,
)

RESULTS = Path(__file__).parent / "results"
SIZES = ("64,96,4", "64,128,4")
MAX_PIECES = 16
HALF = "plan at half of large"


class SizeOf(click.ParamType[tuple[int, int, int]]):
    """s, r and the number of blocks."""

    name = "S,R,BLOCKS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int]:
        parts = value.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is no size; write s, r and the number of blocks like 64,96,8", param, ctx)
        s, r, blocks = map(int, parts)
        return s, r, blocks


def by_hand(costed: Costed) -> dict[str, Sequence]:
    """The schedules that people make by hand; those with kernels under their own names."""
    table = costed.table
    makers = {"small": every_submodule, "large": every_block}
    schedules = {"none": keep_everything(table), "sqrt": square_root(table)}
    schedules |= {name: make(table) for name, make in makers.items()}
    return schedules | {f"{name}+kernels": make(table, fastest_kernels) for name, make in makers.items()}


class Bench:
    """One model and one set of inputs, run under several plans."""

    def __init__(self, costed: Costed, kind: str) -> None:
        self.costed, self.kind, problem = costed, kind, costed.problem
        self.stack = random_stack(problem, kind)
        self.inputs = random_inputs(problem, problem.state_shapes() | problem.mask_shapes(), kind)
        self.plans: dict[str, Plan] = {}
        self.trials: dict[str, Trial] = {}
        self.peaks: dict[str, int] = {}

    def add(self, name: str, plan: Plan) -> None:
        """Run a plan once and measure its peak."""
        self.add_module(name, apply_plan(self.stack, plan))
        self.plans[name] = plan

    def add_module(self, name: str, module: Any) -> None:
        """Run the stack under anything that is called like it, and measure its peak."""
        trial = Trial(module, self.costed.problem, self.inputs)
        trial.run()
        self.trials[name] = trial
        self.peaks[name] = self.static_bytes(trial) + measure.peak_bytes(trial.run, self.kind)

    def static_bytes(self, trial: Trial) -> int:
        """What is there before a step."""
        static = self.costed.static
        return trial.live_bytes() + static["optimizer"] + static["workspace"]

    def plan_for(self, budget: int) -> Plan:
        """The plan for so many bytes."""
        problem = self.costed.problem.model_copy(update={"budget_bytes": budget})
        return solve(replace(self.costed, problem=problem))


def run_size(
    problem: Problem,
    cache: str | None,
    rounds: int,
    compiled: bool,
    say: Progress,
    names: Collection[str] | None = None,
    repeats: int = 5,
    max_pieces: int = MAX_PIECES,
) -> dict[str, Any]:
    """Everything about one size.

    Args:
        names: of the schedules by hand that are run; None for all.
        repeats, max_pieces: of the profile of the steps.
    """
    profile_problem(problem, cache, repeats, max_pieces, compiled=compiled, progress=say)
    size = f"s={problem.shape.n_seq}, r={problem.shape.n_res}"
    say.done(f"{size}: steps measured")
    costed = cost_with_times(problem, "measured", cache)
    bench = Bench(costed, problem.device)
    hand = {name: found for name, found in by_hand(costed).items() if names is None or name in names}
    for name, schedule in hand.items():
        say(f"measuring {name}")
        bench.add(name, plan_of(costed, schedule, SolverReport(name=name, seconds=0.0)))
        say.done(f"{size}: {name} takes {format_size(bench.peaks[name])}")
    for name in hand:
        say(f"planning for the peak of {name}")
        bench.add(f"plan at {name}", bench.plan_for(bench.peaks[name]))
        say.done(f"{size}: planned for the peak of {name}")
    with suppress(NoPlanError):  # of small shapes parameters and gradients take more than that
        bench.add(HALF, bench.plan_for(bench.peaks["large"] // 2))

    def told(number: int) -> None:
        say.done(f"{size}: round {number} of {rounds}")

    say("running")
    runs = {name: trial.run for name, trial in bench.trials.items()}
    times = interleaved(runs, rounds, problem.device, told)
    return {
        "blocks": problem.config.n_block, "s": problem.shape.n_seq, "r": problem.shape.n_res,
        "dtype": problem.precision, "compiled": compiled, "rounds": rounds,
        "runs": {
            name: {
                "peak_bytes": bench.peaks[name],
                "predicted_peak_bytes": bench.plans[name].predicted.peak_bytes,
                "seconds": float(np.median(seconds)),
                "quartiles": [float(np.percentile(seconds, q)) for q in (25, 75)],
                "predicted_seconds": bench.plans[name].predicted.step_seconds,
                "kernels": dict(Counter(each.kernel for each in last_choices(bench.plans[name].schedule))),
            }
            for name, seconds in times.items()
        },
        "comparisons": _comparisons(list(hand), times, bench.peaks),
    }  # fmt: skip


def _comparisons(
    hand: list[str], times: dict[str, list[float]], peaks: dict[str, int]
) -> list[dict[str, Any]]:
    """Each plan over what it is compared with: time and peak."""
    pairs = [(f"plan at {name}", name) for name in hand] + [(HALF, "large")] * (HALF in times)
    found = []
    for ours, theirs in pairs:
        ratios = np.divide(times[ours], times[theirs])
        found.append(
            {
                "plan": ours,
                "against": theirs,
                "time_ratio": float(np.median(times[ours]) / np.median(times[theirs])),
                "quartiles": [float(np.percentile(ratios, q)) for q in (25, 75)],
                "peak_ratio": peaks[ours] / peaks[theirs],
            }
        )
    return found


@click.command()
@click.option("--size", "sizes", type=SizeOf(), multiple=True, default=SIZES, show_default=True)
@click.option("--rounds", type=REPEATS, default=5, show_default=True, help="Timed runs of each.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Also offer torch.compile on each submodule.")
@click.option("--redraw", is_flag=True, help="Only the picture, from the figures that are there.")
@click.option("--cache", type=click.Path(), help="File of measured times; else EVOPLAN_CACHE.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(),
    help="Where the result goes, with a picture beside it; -: to standard output; else experiments/results.",
)
def benchmark(
    sizes: tuple[tuple[int, int, int], ...],
    rounds: int,
    device: str,
    dtype: str,
    compiled: bool,
    redraw: bool,
    cache: str | None,
    json_path: str | None,
) -> None:
    """Plans against schedules by hand, at equal measured peaks."""
    path = Path(json_path) if json_path else RESULTS / f"benchmark-{device}.json"
    picture = None if json_path == STDOUT else path.with_suffix(".png")
    check_writable(picture, json_path=path, reads=(cache,))
    if redraw:
        _save(_kept(path), picture)
        return
    console = console_for_output(json_path=json_path)
    document: dict[str, Any] = {"torch": torch.__version__, "device": local_name(device), "sizes": []}
    for s, r, blocks in sizes:
        config = EvoformerConfig(n_block=blocks).with_dropout(0.0)
        problem = Problem(
            model="alphafold2", config=config, shape=InputShape(s, r), dtype=dtype, device=device,
            optimizer="none",
        )  # fmt: skip
        with progress("measuring") as say:
            found = run_size(problem, cache, rounds, compiled, say)
        document["sizes"].append(found)
        print_size(found, console)
    if picture is not None:
        document["sizes"] = _with_earlier(path, document)
    write_json(path, document)
    if picture is not None:
        _save(document, picture)


def _kept(path: Path) -> dict[str, Any]:
    """The figures of an earlier run; ValueError where there are none."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all("runs" in found for found in document["sizes"]):
            raise LookupError
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{path}: no figures of this benchmark to draw; leave --redraw out") from None
    return document


def _save(document: dict[str, Any], path: Path | None) -> None:
    if path is None:
        raise ValueError("--redraw draws beside a file; leave --json - out")
    from evoplan.planner.reports.plot import save_figure

    save_figure(draw(document), path)


def _with_earlier(path: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The sizes of a document, and those that the file has from the same device and torch."""

    def size(found: dict[str, Any]) -> tuple[Any, ...]:
        compiled = bool(found.get("compiled"))
        return (*(found.get(key) for key in ("s", "r", "blocks", "dtype")), compiled)

    new: list[dict[str, Any]] = document["sizes"]
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if any(earlier[key] != document[key] for key in ("torch", "device")):
            return new
        kept = [found for found in earlier["sizes"] if size(found) not in set(map(size, new))]
        return sorted([*kept, *new], key=lambda found: size(found)[:3])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none yet, or something else
        return new


if __name__ == "__main__":
    run_command(benchmark, "python -m evoplan.experiments.benchmark")
