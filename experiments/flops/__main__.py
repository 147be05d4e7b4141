"""FLOPs of TinyOpenFold, and how well a device is used: python -m evoplan.experiments.flops."""

from __future__ import annotations

import sys
from typing import Any

import click

from evoplan.planner.commands.flags import STEPS
from evoplan.planner.commands.terminal import CHECK_FAILED, progress, run_command
from evoplan.planner.files import make_folder

ANALYSES = ("detailed", "intensity", "roofline")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="On each device.")
@click.option("--seq-len", type=click.IntRange(1), default=64, show_default=True, help="Residues.")
@click.option("--num-seqs", type=click.IntRange(1), default=16, show_default=True, help="Sequences.")
@click.option("--msa-dim", type=click.IntRange(1), default=64, show_default=True)
@click.option("--pair-dim", type=click.IntRange(1), default=128, show_default=True)
@click.option("--num-blocks", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--num-steps",
    type=STEPS,
    default=10,
    show_default=True,
    help="Timed steps; 5 of warm-up come before.",
)
@click.option("--output-dir", type=click.Path(), default="./flops_analysis", show_default=True)
@click.option("--device", help="Number of a GPU, cpu or cuda; else the first GPU, or the CPU without one.")
@click.option("--multi-gpu", is_flag=True, help="All GPUs at once; without GPUs give --devices.")
@click.option("--devices", help="Those GPUs at once, as 0,1; without GPUs so many processes share the cores.")
@click.option("--detailed", is_flag=True, help="Print every component, counted both ways.")
@click.option("--intensity", is_flag=True, help="Also write computational_intensity.json.")
@click.option("--roofline", is_flag=True, help="Also write roofline_data.json and roofline.png.")
@click.option("--all", "everything", is_flag=True, help="All three analyses.")
def command(
    output_dir: str,
    device: str | None,
    multi_gpu: bool,
    devices: str | None,
    num_steps: int,
    everything: bool,
    **flags: Any,
) -> None:
    """Count the FLOPs of a training step, time some, and say how well the device is used.

    Exit code 1 where the counters disagree.
    """
    asked = {name: flags.pop(name) for name in ANALYSES}
    wanted = [name for name in ANALYSES if asked[name] or everything]
    sizes: dict[str, int] = flags
    folder = make_folder(output_dir)
    if multi_gpu or devices is not None:
        if device is not None:
            raise ValueError(
                "--device is one device, --devices and --multi-gpu are several; give one of them"
            )
        from evoplan.experiments.flops.several import profile_several

        agree = profile_several(folder, devices, num_steps, sizes, wanted)
    else:
        with progress("loading torch") as update:
            from evoplan.experiments.flops.single import profile_single

            agree = profile_single(folder, device, num_steps, sizes, set(wanted), update)
    sys.exit(0 if agree else CHECK_FAILED)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.flops")
