"""What the FLOPs analysis prints."""

from __future__ import annotations

from typing import Any

import click

from evoplan.planner.sizes import format_rate, in_thousands


def print_profile(profile: dict[str, Any], detailed: bool) -> None:
    """What flops_profile.json says, and where it is wanted every component counted both ways."""
    analysis, efficiency = profile["flops_analysis"], profile["efficiency_metrics"]
    total, counters = analysis["total_flops"], analysis["counters"]
    click.echo("FLOPS Analysis Summary:")
    click.echo(f"   Total FLOPS per step: {total:.4e}")
    click.echo(f"   By FlopCounterMode:   {counters['flop_counter_mode']:.4e}")
    if counters["deepspeed_forward"] is not None:
        click.echo(f"   Forward by formula:   {counters['analytic_forward']:.4e}")
        click.echo(f"   Forward by DeepSpeed: {counters['deepspeed_forward']:.4e}")
        click.echo(f"   Its elementwise ones: {counters['deepspeed_forward_elementwise']:.1e}")
    click.echo(f"   FLOPS per parameter: {analysis['flops_per_parameter']:.2f}")
    throughput = profile["performance_metrics"]["throughput_samples_per_sec"]
    click.echo(f"   Throughput: {throughput:.1f} samples/sec")
    click.echo(f"   Model FLOPS Utilization: {efficiency['mfu_percent']:.1f}%")
    peak = format_rate(efficiency["device_peak_flops"])
    click.echo(f"   (of {peak}: {efficiency['device_peak_source']})")
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


def print_intensity(found: dict[str, Any]) -> None:
    """What computational_intensity.json says."""
    click.echo("\nComputational Intensity Analysis:")
    click.echo(f"   Arithmetic Intensity: {found['arithmetic_intensity_flops_per_byte']:.2f} FLOPS/byte")
    click.echo(f"   Device Balance: {found['device_balance_flops_per_byte']:.2f} FLOPS/byte")
    click.echo(f"   Memory Bandwidth Used: {found['memory_bandwidth_used_gb_per_sec']:.1f} GB/s")
    click.echo(f"   Memory Bandwidth Utilization: {found['memory_bandwidth_utilization_percent']:.1f}%")
    click.echo(f"   Classification: {found['memory_bound_vs_compute_bound']}")


def print_several(document: dict[str, Any]) -> None:
    """What flops_profile_multi_gpu.json says of all devices together."""
    found = document["aggregate_metrics"]
    click.echo("Aggregate Multi-GPU Summary:")
    click.echo(f"   Number of GPUs: {found['num_gpus']}")
    rate, prefix = in_thousands(found["total_system_tflops"] * 1e12)
    click.echo(f"   Total System {prefix}FLOPS: {rate:.4g}")
    click.echo(f"   Average MFU: {found['avg_mfu_percent']:.1f}%")
    click.echo(f"   MFU Std Dev: {found['mfu_std_dev']:.1f}%")
    click.echo(f"   Total Throughput: {found['total_throughput']:.1f} samples/sec")
    click.echo(f"   Multi-GPU Efficiency: {found['multi_gpu_efficiency_percent']:.1f}%")
    click.echo(f"   Speedup vs Single GPU: {document['comparison']['speedup']:.2f}x")
