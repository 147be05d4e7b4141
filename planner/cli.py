"""The command line: reads arguments, calls the planner, prints. Only commands import torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cost_model.devices import DEVICES, DTYPES
from cost_model.static import OPTIMIZER_STATES
from model.config import PRESETS, InputShape, ModelConfig, TrunkConfig, override, preset
from planner.errors import RunError
from planner.sizes import format_size, parse_size

if TYPE_CHECKING:
    from rich.console import Console

    from planner.planning import Costed
    from planner.problem import Problem

BAD_INPUT, INFEASIBLE, CHECK_FAILED = 2, 3, 1


_MODES = ["training", "inference"]
AUTO = 0  # --ranks auto


class Size(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Dropout(click.ParamType):
    name = "P|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            rate = 0.0 if value == "off" else float(value)
        except ValueError:
            rate = -1.0
        if not 0 <= rate < 1:
            self.fail(f"{value!r} is not a dropout rate; write off or a number from 0 to below 1", param, ctx)
        return rate


class _Ranks(click.ParamType):
    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "auto" or isinstance(value, int):
            return AUTO if value == "auto" else value
        try:
            ranks = int(value)
        except ValueError:
            ranks = 0
        if ranks < 1:
            self.fail(f"{value!r} is no number of ranks; write a whole number from 1, or auto", param, ctx)
        return ranks


_PROBLEM_OPTIONS = [
    click.option("--model", default="alphafold2", show_default=True, help=f"Preset: {', '.join(PRESETS)}."),
    click.option("--n-blocks", type=click.IntRange(1), help="Blocks of the stack."),
    click.option("--n-seq", type=click.IntRange(1), help="Rows s of the alignment."),
    click.option("--n-res", type=click.IntRange(1), help="Residues r."),
    click.option("--n-extra", type=click.IntRange(1), help="Rows of the extra alignment, for a trunk."),
    click.option("--c-m", type=click.IntRange(1), help="Channels of the MSA representation."),
    click.option("--c-z", type=click.IntRange(1), help="Channels of the pair representation."),
    click.option("--batch", type=click.IntRange(1), help="Alignments per step."),
    click.option("--msa", type=click.Path(), help="Take r, and s up to --n-seq, from this alignment."),
    click.option("--dtype", default="float32", show_default=True, help=f"One of {', '.join(DTYPES)}."),
    click.option("--mode", type=click.Choice(_MODES), default=_MODES[0], show_default=True),
    click.option("--dropout", type=_Dropout(), help="One rate everywhere, or off; else the preset's own."),
    click.option(
        "--optimizer", type=click.Choice(list(OPTIMIZER_STATES)), default="adamw", show_default=True,
        help="Its states count.",
    ),
    click.option("--device", default="cpu", show_default=True, help=f"cuda, or one of {', '.join(DEVICES)}."),
    click.option("--memory", type=Size(), help="Budget, like 16GiB; else the device's memory."),
    click.option(
        "--ranks", type=_Ranks(), default=1, show_default=True,
        help="Devices that share each input; auto: as few as the budget needs.",
    ),
    click.option("--link", type=Size(), help="Between ranks, each way, per second; else the device's."),
]  # fmt: skip
_JSON = click.option("--json", "json_path", type=click.Path(), help="Also write the result as JSON.")


def _problem_options(command: Callable) -> Callable:
    for option in reversed(_PROBLEM_OPTIONS):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="evoplan")
def cli() -> None:
    """Plan, run and verify Evoformer stacks within a memory budget."""


@cli.command()
@_problem_options
@click.option(
    "--solver", "solver_name", default="dp", show_default=True,
    help="dp, cp-sat, none, small, large, sqrt or seed-dp.",
)  # fmt: skip
@click.option("--certify", is_flag=True, help="Also prove how far from optimal the plan may be.")
@click.option("--out", type=click.Path(), help="Write the plan here.")
@_JSON
def plan(solver_name: str, certify: bool, out: str | None, json_path: str | None, **flags: Any) -> None:
    """Find the fastest schedule that fits; print it and what it saves."""
    check_writable(out, json_path)
    auto = flags["ranks"] == AUTO
    problem = _problem(**flags | {"ranks": 1} if auto else flags)
    from planner.plan import write_json
    from planner.planning import NoPlanError, cost_problem, solve, solve_for_fewest_ranks
    from planner.report import print_plan
    from planner.solvers import solver

    solver(solver_name)  # a wrong name is said before the work
    try:
        with _progress("loading torch") as update:
            if auto:
                costed, found = solve_for_fewest_ranks(problem, solver_name, update)
            else:
                costed = cost_problem(problem, progress=lambda name: update(f"tracing {name}"))
                update("solving")
                found = solve(costed, solver_name)
            if certify:
                from planner.certify import certify as with_certificates

                found = with_certificates(costed, found, update)
    except NoPlanError as error:
        if json_path:
            least = {"least_feasible_bytes": error.least_feasible_bytes, "budget_bytes": problem.budget_bytes}
            write_json(json_path, least)
        raise
    print_plan(found, console_for_output())
    for path in filter(None, (out, json_path)):
        found.save(path)
    if out:
        click.echo(f"plan written to {out}")


@cli.command()
@click.argument("plan_file", type=click.Path())
@_JSON
def show(plan_file: str, json_path: str | None) -> None:
    """Print a plan: its schedule, its memory over time, and where the peak is and why."""
    check_writable(json_path)
    from planner.plan import load_plan, write_json
    from planner.planning import cost_problem
    from planner.replay import replay
    from planner.report import print_plan, print_schedule, print_timeline, step_names

    found = load_plan(plan_file)
    with _progress("tracing") as update:
        costed = cost_problem(found.problem, progress=update)
    console = console_for_output()
    print_plan(found, console)
    console.print()
    print_schedule(found, console)
    console.print()
    result = replay(found.sequence(), costed.table)
    print_timeline(result, costed.fixed_bytes, step_names(found.problem), console)
    if json_path:
        moments = [
            {**vars(moment), "held_bytes": costed.fixed_bytes + moment.held_bytes,
             "peak_bytes": costed.fixed_bytes + moment.peak_bytes}
            for moment in result.moments
        ]  # fmt: skip
        write_json(json_path, {"plan": found.to_json(), "timeline": moments})


@cli.command()
@click.argument("plan_file", type=click.Path())
@click.option(
    "--simulate", is_flag=True, help="Memory only, on fake tensors: for what this machine cannot hold."
)
@click.option("--blocks", type=click.IntRange(1), help="Only the first K blocks of the stack.")
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed runs; medians count."
)
@_JSON
def verify(plan_file: str, simulate: bool, blocks: int | None, repeats: int, json_path: str | None) -> None:
    """Apply a plan, measure it here, and compare it with the model without a plan.

    A plan for several ranks: torchrun --nproc_per_node=N -m planner verify ...
    """
    from planner.world import joined

    with joined(timeout=60) as world:
        check_writable(json_path)
        from planner.plan import load_plan, write_json
        from planner.planning import shorten_plan
        from planner.report import describe_problem, print_rank_verifications, print_verification
        from planner.verify import simulate_plan, verify_on, verify_plan

        found = load_plan(plan_file)
        with _progress("preparing") as update:
            if blocks is not None and blocks < found.problem.config.n_block:
                found = shorten_plan(found, blocks, progress=update)
            elif blocks is not None and blocks > found.problem.config.n_block:
                raise ValueError(f"--blocks {blocks}: the plan has {found.problem.config.n_block} blocks")
            update("simulating" if simulate else "running")
            if simulate:
                results = [simulate_plan(found, rank) for rank in range(found.problem.ranks)]
            elif found.problem.ranks * world.size == 1:
                results = [verify_plan(None, found, repeats, progress=update)]
            else:
                results = verify_on(world, found, repeats, f"verify {plan_file}", update)
        if world.first:
            console = console_for_output()
            console.print(describe_problem(found.problem), highlight=False)
            print_verification(results[0], console)
            print_rank_verifications(results, console)
            if json_path:
                ranks = [{"rank": rank, **result.to_json()} for rank, result in enumerate(results)]
                write_json(json_path, results[0].to_json() | ({"ranks": ranks} if len(ranks) > 1 else {}))
    sys.exit(0 if all(result.ok for result in results) else CHECK_FAILED)


@cli.command()
@_problem_options
@click.option("--points", type=click.IntRange(2, 2000), default=60, show_default=True, help="Budgets.")
@click.option("--out", type=click.Path(), help="Write the frontier as JSON here.")
@click.option("--plot", type=click.Path(), help="Draw it here (png, svg or pdf).")
@_JSON
def sweep(points: int, out: str | None, plot: str | None, json_path: str | None, **flags: Any) -> None:
    """The frontier of memory and time, baselines marked on it."""
    check_writable(out, plot, json_path)
    problem = _problem(**flags)
    from planner.plan import write_json
    from planner.planning import sweep as sweep_frontier
    from planner.plot import plot_sweep
    from planner.report import print_sweep

    if not problem.training:
        raise ValueError("sweep is for training; for inference ask plan for one budget after another")

    costed = _costed(problem.model_copy(update={"budget_bytes": None}))
    with _progress("solving") as update:
        document = sweep_frontier(costed, points, update)
    print_sweep(document, console_for_output())
    for path in filter(None, (out, json_path)):
        write_json(path, document)
    if plot:
        plot_sweep(document, plot)
        click.echo(f"picture written to {plot}")


@cli.command()
@click.argument("plan_file", type=click.Path())
@click.option("--msa", type=click.Path(), help="A3M or FASTA alignment; random data if not given.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--learning-rate", type=click.FloatRange(0, 1e3, min_open=True), default=2e-4, show_default=True
)
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="That train together on batches of their own, under torchrun.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 86400),
    default=60,
    show_default=True,
    help="Seconds after which a rank that hangs ends the run.",
)
@click.option("--snapshots", type=click.Path(), help="Folder to write snapshots to, and to resume from.")
@click.option(
    "--save-every", type=click.IntRange(1), help="Steps between snapshots; one more after the last."
)
@click.option("--resume", is_flag=True, help="Go on from the newest complete snapshot.")
@_JSON
def run(plan_file: str, timeout: float, json_path: str | None, **flags: Any) -> None:
    """Train (masked-MSA loss) or infer under a plan; print predicted beside measured.

    Alone, or on several processes: torchrun --nproc_per_node=N -m planner run ...
    """
    from planner.world import joined

    with joined(timeout) as world:
        check_writable(json_path)
        if flags["learning_rate"] != flags["learning_rate"]:
            raise ValueError("--learning-rate nan is not a number; give one like 2e-4")
        if not flags["snapshots"] and (flags["save_every"] or flags["resume"]):
            raise ValueError("--save-every and --resume need a folder: add --snapshots DIR")
        from planner.plan import load_plan, write_json
        from planner.run import Settings, run_plan
        from planner.world import check_world

        found, settings = load_plan(plan_file), Settings(**flags)
        command = f"run {plan_file} --replicas {settings.replicas}"
        check_world(found, world, command, settings.replicas, settings.agreed())
        document = run_plan(found, settings, console_for_output(), world)
        if json_path and world.first:
            write_json(json_path, document)
    sys.exit(0 if document["ok"] else CHECK_FAILED)


def _problem(
    model: str,
    n_blocks: int | None,
    n_seq: int | None,
    n_res: int | None,
    n_extra: int | None,
    c_m: int | None,
    c_z: int | None,
    batch: int | None,
    msa: str | None,
    dropout: float | None,
    device: str,
    memory: int | None,
    ranks: int,
    link: int | None,
    **rest: Any,
) -> Problem:
    """The problem that the flags describe."""
    chosen = preset(model)
    config = _resized(chosen.config, n_blocks, c_m, c_z)
    if dropout is not None:
        config = config.with_dropout(dropout)
    shape: InputShape = chosen.shape
    if n_extra is not None and shape.n_extra is None:
        raise ValueError(f"--n-extra: {model} has no extra stack; use --model alphafold2-trunk")
    if msa is not None:
        from planner.problem import shape_for_alignment

        shape = shape_for_alignment(shape, msa, n_seq, n_extra)
        n_seq = n_extra = None  # limits, which the shape keeps
    shape = override(shape, n_seq=n_seq, n_res=n_res, batch=batch, n_extra=n_extra)
    if device not in (*DEVICES, "cuda"):
        raise ValueError(f"unknown device {device!r}; choose one of: {', '.join(DEVICES)}, cuda")
    if ranks == AUTO:
        raise ValueError("--ranks auto is for plan; give a number")
    from planner.problem import Problem

    if memory is None and device in DEVICES:
        memory = DEVICES[device].memory_bytes
    return Problem(
        model=model, config=config, shape=shape, device=device, budget_bytes=memory, ranks=ranks,
        link=None if link is None else replace(DEVICES.get(device, DEVICES["cpu"]).link, bandwidth=link),
        **rest,
    )  # fmt: skip


def _resized(config: ModelConfig, n_blocks: int | None, c_m: int | None, c_z: int | None) -> ModelConfig:
    """The model with other sizes; in a trunk --n-blocks and --c-m are those of the main stack."""
    if isinstance(config, TrunkConfig):
        extra = override(config.extra, c_z=c_z)
        return TrunkConfig(extra, override(config.main, n_block=n_blocks, c_m=c_m, c_z=c_z))
    return override(config, n_block=n_blocks, c_m=c_m, c_z=c_z)


def _costed(problem: Problem) -> Costed:
    with _progress("loading torch") as update:
        from planner.planning import cost_problem

        return cost_problem(problem, progress=lambda name: update(f"tracing {name}"))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal; nothing where output goes to a file."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda text: status.update(text)


def console_for_output() -> Console:
    """As wide as the terminal, or wide enough for every table."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=110)


def check_writable(*paths: str | None) -> None:
    """Refuse a path that cannot be written before the work is done."""
    for path in filter(None, paths):
        parent = Path(path).absolute().parent
        if not parent.is_dir():
            raise ValueError(f"{path}: folder {parent} does not exist; make it first")
        if Path(path).is_dir():
            raise ValueError(f"{path}: is a folder; name a file")
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"{path}: is not an ordinary file; name one")
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{path}: folder {parent} is not writable; name another")


def main(arguments: list[str] | None = None, command: click.Command = cli, name: str = "evoplan") -> None:
    """Run a command: one line per error, exit codes 2 (bad input), 3 (no plan fits), 1 (a check failed)."""

    def fail(message: str, code: int) -> NoReturn:
        click.echo(f"{name}: {' '.join(message.split())}", err=True)
        sys.exit(code)

    try:
        command.main(args=arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
    except click.ClickException as error:
        fail(f"{error.format_message()} (see {name} --help)", BAD_INPUT)
    except click.exceptions.Abort:
        fail("interrupted", 130)
    except MemoryError:
        fail(
            "this machine's memory is not enough; use --simulate, fewer blocks or a smaller budget",
            CHECK_FAILED,
        )
    except RunError as error:
        fail(str(error), CHECK_FAILED)
    except (ValueError, OSError) as error:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            fail(where + first["msg"].removeprefix("Value error, "), BAD_INPUT)
        least = getattr(error, "least_feasible_bytes", None)
        if least is not None:
            fail(f"{error} = {format_size(least)}", INFEASIBLE)
        fail(str(error), BAD_INPUT)
