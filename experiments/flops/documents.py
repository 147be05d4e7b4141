"""What a profile says: counts and times put together, in the files that the original's readers know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from statistics import mean, pstdev
from typing import Any

from evoplan.cost_model.devices import Device
from evoplan.cost_model.flops import Flops
from evoplan.cost_model.roofline import balance, bounds
from evoplan.cost_model.trace import Work
from evoplan.experiments.flops.counts import DeepSpeedCount
from evoplan.experiments.tiny_openfold.memory import Memory
from evoplan.experiments.tiny_openfold.output import model_config
from evoplan.experiments.tiny_openfold.training import Recipe, StepResult

MB = 1e6
DTYPE = "float32"


def _sizes(recipe: Recipe) -> dict[str, Any]:
    return {
        "batch_size": recipe.shape.batch,
        "sequence_length": recipe.shape.n_res,
        "msa_sequences": recipe.shape.n_seq,
    }


def _components(
    formula: Mapping[str, Flops], counted: Mapping[str, Flops], works: Mapping[str, Work]
) -> list[dict[str, Any]]:
    return [
        {
            "component": name,
            "forward_flops": formula[name].forward,
            "backward_flops": formula[name].backward,
            "counted_forward_flops": counted[name].forward,
            "counted_backward_flops": counted[name].backward,
            "bytes_moved": works[name].bytes,
            "kernels": works[name].launches,
        }
        for name in formula
    ]


def _deepspeed(found: DeepSpeedCount | None) -> dict[str, int | None]:
    products, elementwise = (None, None) if found is None else found
    return {"deepspeed_forward": products, "deepspeed_forward_elementwise": elementwise}


def _steps(steps: list[StepResult], flops: int) -> list[dict[str, Any]]:
    return [
        {
            "step": index,
            "loss": step.loss,
            "flops": flops,
            "time": step.seconds,
            "flops_per_sec": flops / step.seconds,
        }
        for index, step in enumerate(steps)
    ]


def _efficiency(achieved: float, device: Device) -> dict[str, Any]:
    peak = device.peak_flops[DTYPE]
    return {
        "mfu_percent": 100 * achieved / peak,
        "achieved_flops_per_sec": achieved,
        "device_peak_flops": peak,
        "device_peak_source": device.source,
        "efficiency_ratio": achieved / peak,
        "achieved_tflops": achieved / 1e12,
        "peak_tflops": peak / 1e12,
    }


def flops_document(
    recipe: Recipe,
    device: Device,
    where: str,
    parameters: tuple[int, int],
    formula: Mapping[str, Flops],
    counted: Mapping[str, Flops],
    whole_step: int,
    deepspeed: DeepSpeedCount | None,
    works: Mapping[str, Work],
    steps: list[StepResult],
) -> dict[str, Any]:
    """flops_profile.json.

    Args:
        where: the device that torch ran on.
        parameters: how many there are, and how many of them are trained.
        formula, counted: FLOPs of each component, by formula and by FlopCounterMode.
        whole_step: by FlopCounterMode, all at once.
        deepspeed: of the forward pass; None without it.
    """
    total = sum(flops.total for flops in formula.values())
    seconds = mean(step.seconds for step in steps)
    achieved = total / seconds
    return {
        "model_info": {
            "total_params": parameters[0],
            "trainable_params": parameters[1],
            "config": model_config(recipe),
            "architecture": "Evoformer",
        },
        "profiling_config": {**_sizes(recipe), "num_steps": len(steps), "device": where},
        "flops_analysis": {
            "total_flops": total,
            "avg_flops_per_step": total,
            "flops_per_parameter": total / parameters[0],
            "evoformer_breakdown": {name: flops.total for name, flops in formula.items()},
            "counters": {
                "analytic": total,
                "flop_counter_mode": whole_step,
                **_deepspeed(deepspeed),
                "analytic_forward": sum(flops.forward for flops in formula.values()),
            },
            "detailed_profile": _components(formula, counted, works),
        },
        "performance_metrics": {
            "avg_time_per_step": seconds,
            "throughput_samples_per_sec": recipe.shape.batch / seconds,
            "avg_loss": mean(step.loss for step in steps),
            "flops_per_sec": achieved,
        },
        "efficiency_metrics": _efficiency(achieved, device),
        "step_by_step_results": _steps(steps, total),
        "timestamp": datetime.now().isoformat(),
    }  # fmt: skip


def intensity_document(
    profile: Mapping[str, Any], works: Mapping[str, Work], memory: Memory, device: Device
) -> dict[str, Any]:
    """computational_intensity.json: traffic as if no kernel found its operands in a cache."""
    moved, seconds = sum(work.bytes for work in works.values()), _seconds(profile)
    flops = profile["flops_analysis"]["total_flops"]
    used = moved / seconds
    intensity, edge = flops / moved, balance(device, DTYPE)
    return {
        "arithmetic_intensity_flops_per_byte": intensity,
        "device_balance_flops_per_byte": edge,
        "memory_bandwidth_used_gb_per_sec": used / 1e9,
        "memory_bandwidth_utilization_percent": 100 * used / device.bandwidth,
        "device_memory_bandwidth_gb_per_sec": device.bandwidth / 1e9,
        "memory_bound_vs_compute_bound": "compute_bound" if intensity > edge else "memory_bound",
        "memory_breakdown": {
            **{f"{name}_mb": size / MB for name, size in memory.parts.items()},
            "peak_mb": memory.peak_bytes / MB,
            "total_memory_per_step_mb": moved / MB,
        },
        "components": {
            name: {
                "bytes_moved": found.bytes,
                "arithmetic_intensity_flops_per_byte": found.intensity,
                "bound": f"{found.bound}_bound",
            }
            for name, found in ((name, bounds(work, device, DTYPE)) for name, work in works.items())
        },
        "roofline_metrics": {
            "peak_flops": device.peak_flops[DTYPE],
            "peak_memory_bandwidth": device.bandwidth,
            "achieved_flops": flops / seconds,
            "achieved_bandwidth": used,
        },
    }


def roofline_document(
    profile: Mapping[str, Any], intensity: Mapping[str, Any], works: Mapping[str, Work], device: Device
) -> dict[str, Any]:
    """roofline_data.json."""
    efficiency = profile["efficiency_metrics"]
    return {
        "model_name": "TinyOpenFold - Evoformer",
        "timestamp": datetime.now().isoformat(),
        "device_info": {
            "name": device.name,
            "peak_flops": device.peak_flops[DTYPE],
            "peak_tflops": device.peak_flops[DTYPE] / 1e12,
            "peak_memory_bandwidth": device.bandwidth,
            "source": device.source,
        },
        "performance_point": {
            "arithmetic_intensity": intensity["arithmetic_intensity_flops_per_byte"],
            "achieved_performance": efficiency["achieved_flops_per_sec"],
            "achieved_tflops": efficiency["achieved_tflops"],
            "mfu_percent": efficiency["mfu_percent"],
        },
        "evoformer_breakdown": profile["flops_analysis"]["evoformer_breakdown"],
        "components": {name: asdict(bounds(work, device, DTYPE)) for name, work in works.items()},
        "optimization_targets": optimization_targets(works, device),
    }


def optimization_targets(works: Mapping[str, Work], device: Device) -> list[dict[str, str]]:
    """Components by what the step would gain at most if they ran at the device's peak arithmetic.

    The gain is Amdahl's, on the roofline's times: an upper limit, not a promise.
    """
    found = {name: bounds(work, device, DTYPE) for name, work in works.items()}
    step = sum(bound.predicted_seconds for bound in found.values())
    rows = []
    for name, bound in found.items():
        lost = bound.predicted_seconds - bound.math_seconds
        rows.append((lost, name, bound))
    return [
        {
            "target": name,
            "reason": f"{100 * bound.predicted_seconds / step:.0f} % of the predicted time, "
            f"{bound.bound}-bound at {bound.intensity:.1f} FLOP/byte in {bound.launches} kernels",
            "expected_improvement": f"at most {step / (step - lost):.2f}x for the step, if its traffic and "
            "launches were hidden (fused kernels, or a plan with lean or tiled runs)",
        }
        for lost, name, bound in sorted(rows, key=lambda row: -row[0])
    ]


def several_document(
    recipe: Recipe, devices: list[str], alone: Mapping[str, Any], together: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """flops_profile_multi_gpu.json.

    Args:
        alone: the first device's profile while no other ran.
        together: every device's while all ran.
    """
    mfu = [profile["efficiency_metrics"]["mfu_percent"] for profile in together]
    tflops = [profile["efficiency_metrics"]["achieved_tflops"] for profile in together]
    throughput = [profile["performance_metrics"]["throughput_samples_per_sec"] for profile in together]
    single, total, n = (
        alone["performance_metrics"]["throughput_samples_per_sec"],
        sum(throughput),
        len(devices),
    )
    speedup = total / single
    return {
        "multi_gpu_config": {
            "num_gpus": n,
            "device_ids": devices,
            "batch_size_per_gpu": recipe.shape.batch,
            "total_batch_size": recipe.shape.batch * n,
            "num_steps": alone["profiling_config"]["num_steps"],
        },
        "model_config": model_config(recipe),
        "per_gpu_results": {f"gpu_{name}": found for name, found in zip(devices, together, strict=True)},
        "device_info": [
            {"gpu_id": name, "name": found["profiling_config"]["device"], "mfu_percent": m,
             "achieved_tflops": t, "throughput": s}
            for name, found, m, t, s in zip(devices, together, mfu, tflops, throughput, strict=True)
        ],
        "aggregate_metrics": {
            "num_gpus": n,
            "avg_mfu_percent": mean(mfu),
            "mfu_std_dev": pstdev(mfu),
            "total_system_tflops": sum(tflops),
            "avg_tflops_per_gpu": mean(tflops),
            "total_throughput": total,
            "avg_throughput_per_gpu": mean(throughput),
            "avg_time_per_step": mean(map(_seconds, together)),
            "multi_gpu_efficiency_percent": 100 * speedup / n,
            "scaling_efficiency": {
                "ideal_speedup": n,
                "actual_speedup": speedup,
                "efficiency_ratio": speedup / n,
            },
        },
        "comparison": {
            "single_gpu_throughput": single,
            "multi_gpu_throughput": total,
            "speedup": speedup,
        },
        "timestamp": datetime.now().isoformat(),
    }  # fmt: skip


def counters_agree(profile: Mapping[str, Any]) -> bool:
    """Whether all counters found the same number of FLOPs."""
    counters = profile["flops_analysis"]["counters"]
    deepspeed = counters["deepspeed_forward"]
    return counters["analytic"] == counters["flop_counter_mode"] and (
        deepspeed is None or deepspeed == counters["analytic_forward"]
    )


def _seconds(profile: Mapping[str, Any]) -> float:
    seconds: float = profile["performance_metrics"]["avg_time_per_step"]
    return seconds
