"""FLOPs of TinyOpenFold, and how well a device is used: python -m experiments.flops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from model.config import InputShape, TinyOpenFoldConfig
from planner.errors import RunError
from planner.terminal import CHECK_FAILED, check_writable, progress, run_command

PROFILE, INTENSITY, ROOFLINE = "flops_profile.json", "computational_intensity.json", "roofline_data.json"
SEVERAL, PICTURE = "flops_profile_multi_gpu.json", "roofline.png"
RULE = "=" * 70


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="On each device.")
@click.option("--seq-len", type=click.IntRange(1), default=64, show_default=True, help="Residues.")
@click.option("--num-seqs", type=click.IntRange(1), default=16, show_default=True, help="Sequences.")
@click.option("--msa-dim", type=click.IntRange(1), default=64, show_default=True)
@click.option("--pair-dim", type=click.IntRange(1), default=128, show_default=True)
@click.option("--num-blocks", type=click.IntRange(1), default=4, show_default=True)
@click.option("--num-steps", type=click.IntRange(1), default=10, show_default=True, help="Timed.")
@click.option("--output-dir", type=click.Path(), default="./flops_analysis", show_default=True)
@click.option("--device", help="Number of a GPU, cpu or cuda; else the first GPU, or the CPU without one.")
@click.option("--multi-gpu", is_flag=True, help="All GPUs at once.")
@click.option("--devices", help="Those GPUs at once, as 0,1; without GPUs so many processes share the cores.")
@click.option("--detailed", is_flag=True, help="Print every component, counted both ways.")
@click.option("--intensity", is_flag=True, help="Also write computational_intensity.json.")
@click.option("--roofline", is_flag=True, help="Also write roofline_data.json and roofline.png.")
@click.option("--all", "everything", is_flag=True, help="All three.")
def command(
    output_dir: str, device: str | None, multi_gpu: bool, devices: str | None, everything: bool, **flags: Any
) -> None:
    """Count the FLOPs of a training step, time some, and say how well the device is used.

    Exit code 1 where the counters disagree.
    """
    for name in ("detailed", "intensity", "roofline"):
        flags[name] = flags[name] or everything
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(str(folder / PROFILE))
    if multi_gpu or devices is not None:
        if device is not None:
            raise ValueError(
                "--device is one device, --devices and --multi-gpu are several; give one of them"
            )
        agree = _several(folder, devices, **flags)
    else:
        agree = _one(folder, device, **flags)
    sys.exit(0 if agree else CHECK_FAILED)


def _recipe(
    batch_size: int, seq_len: int, num_seqs: int, msa_dim: int, pair_dim: int, num_blocks: int
) -> Any:
    from experiments.tiny_openfold.training import Recipe

    config = TinyOpenFoldConfig(n_block=num_blocks, c_m=msa_dim, c_z=pair_dim)
    return Recipe(config, InputShape(num_seqs, seq_len, batch_size))


def _one(
    folder: Path,
    device_name: str | None,
    num_steps: int,
    detailed: bool,
    intensity: bool,
    roofline: bool,
    **sizes: int,
) -> bool:
    with progress("loading torch") as update:
        from cost_model.local import local_cpu, local_cuda
        from experiments.flops import documents
        from experiments.flops.counts import analytic, by_deepspeed, counted, counted_step
        from experiments.flops.plot import plot_roofline
        from experiments.tiny_openfold.memory import predict
        from experiments.tiny_openfold.run import device_asked
        from experiments.tiny_openfold.training import WARMUP_STEPS, TinyTraining
        from planner.plan import write_json
        from planner.world import World

        recipe, world = _recipe(**sizes), World()
        world.device = device_asked(device_name, world)
        update("counting")
        formula = analytic(recipe.config, recipe.shape)
        found, works = counted(recipe)
        whole = counted_step(recipe)
        update("running")
        device = local_cuda() if world.device.type == "cuda" else local_cpu()
        training = TinyTraining(recipe, world)
        for number in range(WARMUP_STEPS):
            training.step(training.batch(number))
        steps = []
        for number in range(WARMUP_STEPS, WARMUP_STEPS + num_steps):
            update(f"step {number - WARMUP_STEPS + 1} of {num_steps}")
            steps.append(training.step(training.batch(number)))
    parameters = list(training.parameters.values())
    counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    profile = documents.flops_document(
        recipe, device, str(world.device), counts, formula, found, whole, by_deepspeed(recipe), works, steps
    )
    write_json(folder / PROFILE, profile)
    _print_profile(profile, detailed)
    click.echo(f"\n   Results saved to: {folder / PROFILE}")
    if intensity or roofline:
        memory = predict(recipe, device)
        said = documents.intensity_document(profile, works, memory, device)
        if intensity:
            write_json(folder / INTENSITY, said)
            _print_intensity(said)
            click.echo(f"   Results saved to: {folder / INTENSITY}")
        if roofline:
            data = documents.roofline_document(profile, said, works, device)
            write_json(folder / ROOFLINE, data)
            plot_roofline(data, folder / PICTURE)
            click.echo(f"\nRoofline data: {folder / ROOFLINE}, picture: {folder / PICTURE}")
    return formula == found and profile["flops_analysis"]["total_flops"] == whole


def _several(folder: Path, devices: str | None, **flags: Any) -> bool:
    """Each device in a process of its own: the first alone, then all at once."""
    with progress("loading torch"):
        import torch

        from experiments.flops import documents
        from planner.plan import write_json

    gpus = torch.cuda.device_count()
    names = [str(number) for number in range(gpus)] if devices is None else _numbers(devices)
    if not names:
        raise ValueError("--multi-gpu: no GPU here; give --devices 0,1 to let processes share the cores")
    wrong = [name for name in names if gpus and int(name) >= gpus]
    if wrong:
        raise ValueError(f"--devices {','.join(wrong)}: this machine has {gpus} GPUs, numbered from 0")
    threads = max(1, (os.cpu_count() or 1) // len(names))
    sizes = [name for name in flags if name not in ("detailed", "intensity", "roofline")]
    arguments = [part for name in sizes for part in (f"--{name.replace('_', '-')}", str(flags[name]))]

    def start(name: str, where: Path) -> subprocess.Popen[str]:
        own = ["--device", name if gpus else "cpu", "--output-dir", str(where)]
        environment = os.environ | ({} if gpus else {"OMP_NUM_THREADS": str(threads)})
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.flops", *arguments, *own],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(process: subprocess.Popen[str], name: str, where: Path) -> Any:
        _, errors = process.communicate()
        if process.returncode not in (0, CHECK_FAILED):
            last = (errors.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"device {name}: {last}")
        return json.loads((where / PROFILE).read_text(encoding="utf-8"))

    with progress(f"device {names[0]} alone") as update:
        where = folder / "alone"
        alone = finish(start(names[0], where), names[0], where)
        update(f"devices {', '.join(names)} at once")
        folders = [folder / f"gpu_{name}" for name in names]
        running = [start(name, where) for name, where in zip(names, folders, strict=True)]
        together = [finish(*each) for each in zip(running, names, folders, strict=True)]
    sizes_only = {name: flags[name] for name in sizes if name != "num_steps"}
    document = documents.several_document(_recipe(**sizes_only), names, alone, together)
    write_json(folder / SEVERAL, document)
    _print_several(document)
    click.echo(f"\n   Results saved to: {folder / SEVERAL}")
    return all(_agrees(profile) for profile in (alone, *together))


def _numbers(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(name.isdecimal() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"--devices {text!r}: give different numbers of GPUs with commas between, as 0,1")
    return names


def _agrees(profile: dict[str, Any]) -> bool:
    counters = profile["flops_analysis"]["counters"]
    return counters["analytic"] == counters["flop_counter_mode"]


def _print_profile(profile: dict[str, Any], detailed: bool) -> None:
    analysis, efficiency = profile["flops_analysis"], profile["efficiency_metrics"]
    total, counters = analysis["total_flops"], analysis["counters"]
    click.echo("FLOPS Analysis Summary:")
    click.echo(f"   Total FLOPS per step: {total:.4e}")
    click.echo(f"   By FlopCounterMode:   {counters['flop_counter_mode']:.4e}")
    if counters["deepspeed_forward"] is not None:
        click.echo(
            f"   Forward by DeepSpeed: {counters['deepspeed_forward']:.4e} "
            f"(here {counters['analytic_forward']:.4e})"
        )
    click.echo(f"   FLOPS per parameter: {analysis['flops_per_parameter']:.2f}")
    throughput = profile["performance_metrics"]["throughput_samples_per_sec"]
    click.echo(f"   Throughput: {throughput:.1f} samples/sec")
    click.echo(f"   Model FLOPS Utilization: {efficiency['mfu_percent']:.1f}%")
    click.echo(f"   (of {efficiency['peak_tflops']:g} TFLOP/s: {efficiency['device_peak_source']})")
    click.echo("\nEvoformer FLOPS Breakdown:")
    for name, flops in analysis["evoformer_breakdown"].items():
        click.echo(f"   {name}: {flops:.3e} ({100 * flops / total:.1f}%)")
    if not detailed:
        return
    click.echo("\n   component                    forward    counted   backward    counted     GB moved")
    for row in analysis["detailed_profile"]:
        flops = (
            row[f"{counted}{phase}_flops"]
            for phase in ("forward", "backward")
            for counted in ("", "counted_")
        )
        numbers = " ".join(f"{value:10.3e}" for value in flops)
        click.echo(f"   {row['component']:<25} {numbers} {row['bytes_moved'] / 1e9:12.3f}")


def _print_intensity(said: dict[str, Any]) -> None:
    click.echo("\nComputational Intensity Analysis:")
    click.echo(f"   Arithmetic Intensity: {said['arithmetic_intensity_flops_per_byte']:.2f} FLOPS/byte")
    click.echo(f"   Device Balance: {said['device_balance_flops_per_byte']:.2f} FLOPS/byte")
    click.echo(f"   Memory Bandwidth Used: {said['memory_bandwidth_used_gb_per_sec']:.1f} GB/s")
    click.echo(f"   Memory Bandwidth Utilization: {said['memory_bandwidth_utilization_percent']:.1f}%")
    click.echo(f"   Classification: {said['memory_bound_vs_compute_bound']}")


def _print_several(document: dict[str, Any]) -> None:
    found = document["aggregate_metrics"]
    click.echo("Aggregate Multi-GPU Summary:")
    click.echo(f"   Number of GPUs: {found['num_gpus']}")
    click.echo(f"   Total System TFLOPS: {found['total_system_tflops']:.3f}")
    click.echo(f"   Average MFU: {found['avg_mfu_percent']:.1f}%")
    click.echo(f"   MFU Std Dev: {found['mfu_std_dev']:.1f}%")
    click.echo(f"   Total Throughput: {found['total_throughput']:.1f} samples/sec")
    click.echo(f"   Multi-GPU Efficiency: {found['multi_gpu_efficiency_percent']:.1f}%")
    click.echo(f"   Speedup vs Single GPU: {document['comparison']['speedup']:.2f}x")


if __name__ == "__main__":
    run_command(command, "python -m experiments.flops")
