"""Train TinyOpenFold: python -m experiments.tiny_openfold, or under torchrun on several devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from model.config import InputShape, TinyOpenFoldConfig
from planner.flags import Size
from planner.terminal import check_writable, progress, run_command

TASKS = ("random", "distance")  # model.tiny_data knows them, and imports torch
VALIDATION_STEPS, VALIDATION_BATCH = 3, 2


@dataclass(frozen=True)
class Options:
    """How a run goes, besides what it trains."""

    num_steps: int
    device: str | None
    no_data_parallel: bool
    enable_torch_compile: bool
    plan_path: str | None
    memory: int | None
    snapshots: str
    save_every: int | None
    resume: bool


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--msa-dim", type=click.IntRange(1), default=64, show_default=True, help="Channels of m.")
@click.option("--pair-dim", type=click.IntRange(1), default=128, show_default=True, help="Channels of z.")
@click.option("--num-blocks", type=click.IntRange(1), default=4, show_default=True)
@click.option("--num-seqs", type=click.IntRange(1), default=16, show_default=True, help="Sequences.")
@click.option("--seq-len", type=click.IntRange(1), default=64, show_default=True, help="Residues.")
@click.option(
    "--num-steps", type=click.IntRange(1), default=50, show_default=True, help="After 5 of warm-up."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=4, show_default=True, help="In all; processes share it."
)
@click.option(
    "--learning-rate", type=click.FloatRange(0, 1e3, min_open=True), default=3e-4, show_default=True
)
@click.option(
    "--task", type=click.Choice(TASKS), default=TASKS[0], show_default=True,
    help="random: the original's noise; distance: a chain in space that the alignment encodes.",
)  # fmt: skip
@click.option("--use-amp", is_flag=True, help="Mixed precision, in what the device does best.")
@click.option("--amp-dtype", type=click.Choice(["bfloat16", "float16"]), help="Of --use-amp.")
@click.option("--device", help="Number of a GPU, cpu or cuda; else the first GPU, or the CPU without one.")
@click.option("--no-data-parallel", is_flag=True, help="Refuse to run on several devices.")
@click.option("--enable-torch-compile", is_flag=True, help="Compile the model.")
@click.option("--plan", "plan_path", type=click.Path(), help="Train under this plan of the stack.")
@click.option("--memory", type=Size(), help="Plan for a step within this many bytes on each device.")
@click.option(
    "--save-every", type=click.IntRange(1), help="Steps between snapshots; one more after the last."
)
@click.option(
    "--resume", is_flag=True, help="Go on from the newest snapshot; losses are as if uninterrupted."
)
@click.option(
    "--snapshots", type=click.Path(), default="./snapshots", show_default=True, help="Folder of snapshots."
)
@click.option("--enable-pytorch-profiler", is_flag=True, help="Write traces for TensorBoard and Perfetto.")
@click.option("--enable-memory-profiling", is_flag=True, help="Say what the peak is made of.")
@click.option("--enable-all-profiling", is_flag=True, help="All three kinds.")
@click.option("--profile-operators", is_flag=True, help="Write a table of operators.")
@click.option("--profile-dir", type=click.Path(), default="./pytorch_profiles", show_default=True)
@click.option("--sort-by", default="cuda_time_total", show_default=True, help="Column of that table.")
@click.option(
    "--warmup-steps", type=click.IntRange(0), default=3, show_default=True, help="Before the profile."
)
@click.option("--profile-steps", type=click.IntRange(1), default=5, show_default=True)
@click.option("--validate-setup", is_flag=True, help="Three small steps, to see that all works here.")
@click.option(
    "--timeout", type=click.FloatRange(1, 86400), default=60, show_default=True,
    help="Seconds after which a process that hangs ends the run.",
)  # fmt: skip
def command(timeout: float, validate_setup: bool, **flags: Any) -> None:
    """Train TinyOpenFold on one device, or on several under torchrun, planned or not.

    Prints the loss, the speed and the peak memory, and writes performance_summary.json to --profile-dir.
    """
    if validate_setup:
        flags |= {"num_steps": VALIDATION_STEPS, "batch_size": VALIDATION_BATCH, "save_every": None}
        flags |= {"resume": False, "enable_pytorch_profiler": False, "enable_all_profiling": False}
        flags |= {"profile_operators": False}
    Path(flags["profile_dir"]).mkdir(parents=True, exist_ok=True)
    check_writable(str(Path(flags["profile_dir"]) / "performance_summary.json"))
    with progress("loading torch"):
        from planner.world import joined
    with joined(timeout) as world:
        _run(world, **flags)
        if validate_setup and world.first:
            click.echo("Validation successful! Environment ready.")


def _run(world: Any, **flags: Any) -> None:
    from experiments.tiny_openfold.output import BANNER
    from experiments.tiny_openfold.profiling import SORT_BY, ProfilerConfig
    from experiments.tiny_openfold.run import Run
    from experiments.tiny_openfold.setup import set_up
    from experiments.tiny_openfold.training import Recipe

    everything, use_amp, amp_dtype = (
        flags.pop(name) for name in ("enable_all_profiling", "use_amp", "amp_dtype")
    )
    fields = ProfilerConfig.__dataclass_fields__
    profiler = ProfilerConfig(**{name: flags.pop(name) for name in fields})
    if everything:
        profiler = replace(
            profiler, enable_pytorch_profiler=True, enable_memory_profiling=True, profile_operators=True
        )
    if profiler.sort_by not in SORT_BY:
        raise ValueError(f"--sort-by {profiler.sort_by}: choose one of {', '.join(SORT_BY)}")
    if profiler.steps_needed > flags["num_steps"]:
        raise ValueError(
            f"a profile needs {profiler.steps_needed} steps (--warmup-steps, one more, --profile-steps), "
            f"--num-steps is {flags['num_steps']}; give more"
        )
    config = TinyOpenFoldConfig(
        n_block=flags.pop("num_blocks"), c_m=flags.pop("msa_dim"), c_z=flags.pop("pair_dim")
    )
    shape = InputShape(flags.pop("num_seqs"), flags.pop("seq_len"), flags.pop("batch_size"))
    rate, task = flags.pop("learning_rate"), flags.pop("task")
    if rate != rate:
        raise ValueError("--learning-rate nan is not a number; give one like 3e-4")
    if world.first:
        click.echo(BANNER)
    options = Options(**flags)
    recipe = Recipe(config, shape, rate, task, amp_dtype if use_amp else None)
    if amp_dtype and not use_amp:
        raise ValueError("--amp-dtype is of --use-amp: add it")
    Run(*set_up(recipe, options, world, use_amp), options, profiler).go()


if __name__ == "__main__":
    run_command(command, "python -m experiments.tiny_openfold")
