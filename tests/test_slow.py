"""The figures that take minutes; `make slow` prints them."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from evoplan.planner.plans.plan import load_plan
from evoplan.planner.schedules.schedule import depth

pytestmark = pytest.mark.slow


def evoplan(*arguments: str) -> tuple[float, int]:
    """Run the command line in a process of its own: wall seconds and peak resident bytes."""
    # Not ru_maxrss: a child starts with its parent's, from before it ran anything of its own.
    code = (
        "import sys; from evoplan.planner.commands.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start, int(done.stdout.rsplit("PEAK", 1)[1]) * 1024


def test_accuracy() -> None:
    from evoplan.experiments.accuracy import main

    assert main() == 0


def test_narrow_stack_trains_in_little(tmp_path) -> None:
    """Four blocks whose activations are about 600 MB unplanned train in less than 25."""
    path = tmp_path / "verify.json"
    plan = str(tmp_path / "plan.json")
    flags = ["--model", "alphafold2-narrow", "--dropout", "off"]
    failed = subprocess.run(
        [sys.executable, "-m", "evoplan.planner", "plan", *flags, "--memory", "1MB", "--json", str(path)],
        capture_output=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 3
    least = json.loads(path.read_text())["least_feasible_bytes"]
    evoplan("plan", *flags, "--memory", str(least), "--out", plan)
    evoplan("verify", plan, "--json", str(path))
    found = json.loads(path.read_text())
    planned = found["measured_peak_bytes"] - found["static_bytes"]
    unplanned = found["unplanned_peak_bytes"] - found["static_bytes"]
    print(f"\nunplanned {unplanned / 1e6:.1f} MB, least plan {planned / 1e6:.1f} MB of activations")
    assert planned < 25e6
    assert unplanned > 500e6


@pytest.mark.parametrize(("budget", "least_depth"), [("16GiB", 1), ("4GiB", 2), ("2GiB", 4)])
def test_full_size(tmp_path, budget: str, least_depth: int) -> None:
    """48 blocks at s=512, r=384 in float16: planned from a cold start, then simulated."""
    plan, out = tmp_path / "plan.json", tmp_path / "verify.json"
    seconds, memory = evoplan(
        "plan", "--model", "alphafold2-finetune", "--dtype", "float16", "--device", "a100-40gb",
        "--memory", budget, "--out", str(plan),
    )  # fmt: skip
    assert depth(load_plan(plan).schedule) >= least_depth
    solved = json.loads(plan.read_text())["solver"]["seconds"]
    print(f"\nplanned in {seconds:.1f} s, {memory / 2**20:.0f} MiB; the dynamic program {solved:.2f} s")
    assert memory < 2 * 2**30
    seconds, _ = evoplan("verify", str(plan), "--simulate", "--json", str(out))
    found = json.loads(out.read_text())
    ratio = found["measured_peak_bytes"] / found["predicted_peak_bytes"]
    print(f"simulated in {seconds:.0f} s, peak {ratio:.4f} of predicted")
    assert abs(ratio - 1) <= 0.02


def test_long_protein(tmp_path) -> None:
    """48 blocks at s=128, r=2048 in float32 infer within 9 GiB, inputs and outputs included."""
    plan, out = tmp_path / "plan.json", tmp_path / "verify.json"
    flags = ["--model", "alphafold2-t1044", "--mode", "inference", "--device", "a100-40gb"]
    seconds, memory = evoplan("plan", *flags, "--memory", "9GiB", "--out", str(plan))
    predicted = load_plan(plan).predicted
    print(f"\nplanned in {seconds:.1f} s, {memory / 2**20:.0f} MiB: {predicted.peak_bytes / 2**30:.3f} GiB")
    assert predicted.peak_bytes <= 9 * 2**30
    evoplan("verify", str(plan), "--simulate", "--json", str(out))
    assert json.loads(out.read_text())["measured_peak_bytes"] == predicted.peak_bytes
