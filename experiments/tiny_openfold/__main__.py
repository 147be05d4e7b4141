"""Train TinyOpenFold: python -m evoplan.experiments.tiny_openfold; on several GPUs, a process for each."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Any

import click

from evoplan.experiments.tiny_openfold.options import SORT_BY, SUMMARY, Options, ProfilerConfig
from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.model.families.tiny_openfold import TASKS, Task
from evoplan.planner.commands.flags import STEPS, Number, Size
from evoplan.planner.commands.terminal import progress, run_command
from evoplan.planner.files import check_writable, make_folder

VALIDATION_STEPS, VALIDATION_BATCH = 3, 2


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--msa-dim", type=click.IntRange(1), default=64, show_default=True, help="Channels of m.")
@click.option("--pair-dim", type=click.IntRange(1), default=128, show_default=True, help="Channels of z.")
@click.option("--num-blocks", type=click.IntRange(1), default=4, show_default=True)
@click.option("--num-seqs", type=click.IntRange(1), default=16, show_default=True, help="Sequences.")
@click.option("--seq-len", type=click.IntRange(1), default=64, show_default=True, help="Residues.")
@click.option(
    "--num-steps",
    type=STEPS,
    default=50,
    show_default=True,
    help="Timed steps; 5 of warm-up come before.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=4, show_default=True, help="In all; processes share it."
)
@click.option("--learning-rate", type=Number(0, 1e3, min_open=True), default=3e-4, show_default=True)
@click.option(
    "--task", type=click.Choice(TASKS), default=TASKS[0], show_default=True,
    help="random: the original's noise; distance: a chain in space that the alignment encodes.",
)  # fmt: skip
@click.option("--use-amp", is_flag=True, help="Mixed precision: bfloat16, or float16 on GPUs without it.")
@click.option("--amp-dtype", type=click.Choice(["bfloat16", "float16"]), help="The dtype of --use-amp.")
@click.option("--device", help="Number of a GPU, cpu or cuda; else all GPUs, or the CPU without one.")
@click.option("--no-data-parallel", is_flag=True, help="One device, even where there are several.")
@click.option("--enable-torch-compile", is_flag=True, help="Compile the model.")
@click.option("--plan", "plan_path", type=click.Path(), help="Train under this plan of the stack.")
@click.option("--memory", type=Size(), help="Plan for a step within this many bytes on each device.")
@click.option("--save-every", type=STEPS, help="Steps between snapshots; one more after the last.")
@click.option(
    "--resume", is_flag=True, help="Go on from the newest snapshot; losses are as if uninterrupted."
)
@click.option(
    "--snapshots", type=click.Path(), default="./snapshots", show_default=True, help="Folder of snapshots."
)
@click.option("--enable-pytorch-profiler", is_flag=True, help="Write traces for TensorBoard and Perfetto.")
@click.option("--enable-memory-profiling", is_flag=True, help="Say what the peak is made of.")
@click.option("--enable-all-profiling", is_flag=True, help="Traces, memory, and the table of operators.")
@click.option("--profile-operators", is_flag=True, help="Write a table of operators, operators.txt.")
@click.option("--profile-dir", type=click.Path(), default="./pytorch_profiles", show_default=True)
@click.option(
    "--sort-by",
    default="cuda_time_total",
    show_default=True,
    help="Column that the table of operators is sorted by.",
)
@click.option(
    "--warmup-steps",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Timed steps before the profile.",
)
@click.option("--profile-steps", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--validate-setup",
    is_flag=True,
    help="Three steps of two samples, to see that all works here; writes nothing.",
)
@click.option(
    "--timeout", type=Number(1, 86400), default=60, show_default=True,
    help="Seconds after which a process that hangs ends the run.",
)  # fmt: skip
def command(
    timeout: float,
    use_amp: bool,
    amp_dtype: str | None,
    learning_rate: float,
    task: Task,
    msa_dim: int,
    pair_dim: int,
    num_blocks: int,
    num_seqs: int,
    seq_len: int,
    batch_size: int,
    enable_all_profiling: bool,
    **flags: Any,
) -> None:
    """Train TinyOpenFold on all GPUs that there are, on --device, or on the CPU, planned or not.

    Several GPUs share each batch, a process for each; CUDA_VISIBLE_DEVICES says which. So does torchrun.

    Prints the loss, the speed and the peak memory, and writes performance_summary.json to --profile-dir.
    """
    profiler = ProfilerConfig(**{field.name: flags.pop(field.name) for field in fields(ProfilerConfig)})
    if enable_all_profiling:
        profiler = replace(
            profiler, enable_pytorch_profiler=True, enable_memory_profiling=True, profile_operators=True
        )
    options = Options(**flags)
    if options.validate_setup:
        batch_size, profiler = VALIDATION_BATCH, ProfilerConfig(profile_dir=profiler.profile_dir)
        options = replace(options, num_steps=VALIDATION_STEPS, save_every=None, resume=False)
    if amp_dtype is not None and not use_amp:
        raise ValueError("--amp-dtype is of --use-amp: add it")
    config = TinyOpenFoldConfig(n_block=num_blocks, c_m=msa_dim, c_z=pair_dim)
    shape = InputShape(num_seqs, seq_len, batch_size)
    _check(profiler, options)
    with progress("loading torch"):
        from evoplan.planner.processes.launch import gpus_to_share, start_on_gpus

        gpus = 1 if options.no_data_parallel or options.device or options.validate_setup else gpus_to_share()
    if gpus > 1:
        if batch_size % gpus:
            raise ValueError(
                f"--batch-size {batch_size} does not divide among {gpus} GPUs; give a multiple, "
                "or --device 0 to use one"
            )
        start_on_gpus("evoplan.experiments.tiny_openfold", sys.argv[1:], gpus)
    with progress("loading the model"):
        from evoplan.experiments.tiny_openfold.output import BANNER
        from evoplan.experiments.tiny_openfold.run import Run
        from evoplan.experiments.tiny_openfold.setup import set_up
        from evoplan.experiments.tiny_openfold.training import Recipe
        from evoplan.planner.processes.world import joined
    with joined(timeout) as world:
        if world.first:
            click.echo(BANNER)
        recipe = Recipe(config, shape, learning_rate, task, amp_dtype)
        Run(*set_up(recipe, options, world, use_amp), options, profiler).go()


def _check(profiler: ProfilerConfig, options: Options) -> None:
    """Refuse flags that make no sense together."""
    if profiler.sort_by not in SORT_BY:
        raise ValueError(f"--sort-by {profiler.sort_by}: choose one of {', '.join(SORT_BY)}")
    if profiler.steps_needed > options.num_steps:
        raise ValueError(
            f"a profile needs {profiler.steps_needed} steps (--warmup-steps, one more, --profile-steps), "
            f"--num-steps is {options.num_steps}; give more"
        )
    if options.resume and options.save_every is None:
        raise ValueError("--resume goes on saving: add --save-every")
    if not options.validate_setup:
        summary = make_folder(profiler.profile_dir) / SUMMARY
        check_writable(json_path=summary, reads=(options.plan_path,))
    if options.save_every is not None:
        make_folder(options.snapshots)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.tiny_openfold")
