"""How TinyOpenFold's throughput grows with devices: python -m evoplan.experiments.scaling --gpus "1 2 4 8".

Each run is torchrun's, in a process group of its own, with a log of its own. Without GPUs it scales processes
that share the cores.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from evoplan.experiments.tiny_openfold.options import ProfilerConfig
from evoplan.planner.commands.flags import REPEATS, STEPS, Number
from evoplan.planner.commands.terminal import CHECK_FAILED, run_command
from evoplan.planner.files import make_folder, write_text

SUMMARY, TABLE, CONFIG, PICTURE = "summary.txt", "summary.csv", "config.txt", "scaling.png"
SECONDS_TO_END = 15
COUNTS = (1, 2, 4, 8)
MOST_GPUS, MOST_BATCH = 512, 4096
COLUMNS = ("num_gpus", "batch_size", "run", "throughput_samples_per_sec")


@dataclass(frozen=True)
class Result:
    """One run; throughput is None where it failed."""

    gpus: int
    batch: int
    run: int
    throughput: float | None
    why: str = ""


class _Counts(click.ParamType[list[int]]):
    name = '"N N ..."'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        parts = value.replace(",", " ").split()
        if not parts or not all(part.isdecimal() and 0 < int(part) <= MOST_GPUS for part in parts):
            self.fail(f'{value!r}: give numbers of devices up to {MOST_GPUS}, as "1 2 4 8"', param, ctx)
        return list(dict.fromkeys(int(part) for part in parts))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--gpus", type=_Counts(), show_default="1 2 4 8, as far as there are GPUs", help="Devices, or processes."
)  # fmt: skip
@click.option("--batch-per-gpu", type=click.IntRange(1, MOST_BATCH), default=8, show_default=True)
@click.option("--steps", type=STEPS, default=50, show_default=True)
@click.option(
    "--runs",
    type=REPEATS,
    default=1,
    show_default=True,
    help="Of each number, for a mean and a deviation.",
)
@click.option("--amp", is_flag=True, help="Mixed precision.")
@click.option("--profile", is_flag=True, help="PyTorch's profiler in each run; needs 9 steps.")
@click.option("--output-dir", type=click.Path(), help="Else a new folder, scaling_study_ and the time.")
@click.option("--seq-len", type=click.IntRange(1), help="Residues; else the model's default.")
@click.option("--num-seqs", type=click.IntRange(1), help="Sequences; else the model's default.")
@click.option("--num-blocks", type=click.IntRange(1), help="Else the model's default.")
@click.option(
    "--timeout", type=Number(1, 86400), default=3600, show_default=True, help="Seconds for one run."
)
def command(
    gpus: list[int] | None,
    batch_per_gpu: int,
    steps: int,
    runs: int,
    amp: bool,
    profile: bool,
    output_dir: str | None,
    timeout: float,
    **sizes: int | None,
) -> None:
    """Measure throughput on several numbers of devices: speedup, efficiency, a picture.

    Exit code 1 where a run failed; the others are reported all the same.
    """
    gpus = _counts_here() if gpus is None else gpus
    needed = ProfilerConfig(enable_pytorch_profiler=profile).steps_needed
    if steps < needed:
        raise ValueError(f"--profile needs {needed} steps; give --steps {needed} or more")
    folder = make_folder(output_dir or f"scaling_study_{datetime.now():%Y%m%d_%H%M%S}")
    extra = [part for name, value in sizes.items() if value for part in (_flag(name), str(value))]
    extra += ["--use-amp"] * amp + ["--enable-pytorch-profiler"] * profile
    settings = {
        "gpus": " ".join(map(str, gpus)), "batch_per_gpu": batch_per_gpu, "steps": steps, "runs": runs,
        "amp": amp, "profile": profile, "cores": os.cpu_count(), "extra_flags": " ".join(extra) or "none",
        "started": datetime.now().isoformat(timespec="seconds"),
    }  # fmt: skip
    write_text(folder / CONFIG, "".join(f"{name}: {value}\n" for name, value in settings.items()))
    # As Ctrl-C does, so that no run outlives the study.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = []
    for count in gpus:
        for run in range(1, runs + 1):
            found = _run(folder, count, batch_per_gpu * count, run, steps, extra, timeout)
            results.append(found)
            said = (
                f"failed: {found.why}" if found.throughput is None else f"{found.throughput:.2f} samples/sec"
            )
            click.echo(f"{count} x {batch_per_gpu} samples, run {run}: {said}")
            _write_table(folder / TABLE, results)  # what there is, should the study be stopped
    summary = summarise(results)
    write_text(folder / SUMMARY, summary)
    click.echo("\n" + summary, nl=False)
    if any(result.throughput is not None for result in results):
        _plot(results, folder / PICTURE)
    click.echo(f"\nResults in {folder}")
    sys.exit(CHECK_FAILED if any(result.throughput is None for result in results) else 0)


def _counts_here() -> list[int]:
    """Those of COUNTS that there are GPUs for; all without a GPU, where processes share the cores."""
    import torch

    have = torch.cuda.device_count()
    return [count for count in COUNTS if not have or count <= have]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run(
    folder: Path, count: int, batch: int, run: int, steps: int, extra: list[str], timeout: float
) -> Result:
    name = f"gpu{count}_batch{batch}_run{run}"
    log = folder / f"{name}.log"
    threads = max(1, (os.cpu_count() or 1) // count)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
        "-m", "evoplan.experiments.tiny_openfold", "--batch-size", str(batch), "--num-steps", str(steps),
        "--profile-dir", str(folder / name), *extra,
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return Result(count, batch, run, None, f"not over after {timeout:g} seconds (see {log})")
        finally:
            _end(process)
    if code:
        return Result(count, batch, run, None, f"{_reason(log.read_text(errors='replace'))} (see {log})")
    found = json.loads((folder / name / "performance_summary.json").read_text(encoding="utf-8"))
    return Result(count, batch, run, found["performance_summary"]["avg_training_speed"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Torchrun ends its ranks when it is told to; what is left then is killed."""
    if process.poll() is not None:
        return
    family = _descendants(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END)
    for pid in (*family, process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _reason(text: str) -> str:
    """The program's own line of what went wrong, if it wrote one."""
    own = re.search(r"^(?:evoplan|python -m evoplan.experiments\.tiny_openfold): (.+)$", text, re.MULTILINE)
    return own.group(1) if own else "no result"


def summarise(results: list[Result]) -> str:
    """A line for each number of devices; speedup over the fewest that ran."""
    speeds: dict[int, list[float]] = {}
    failed: dict[int, int] = {}
    for result in results:
        speeds.setdefault(result.gpus, [])
        if result.throughput is None:
            failed[result.gpus] = failed.get(result.gpus, 0) + 1
        else:
            speeds[result.gpus].append(result.throughput)
    good = {count: found for count, found in speeds.items() if found}
    least = min(good, default=0)
    lines = [f"{'GPUs':<6} {'Throughput (s/s)':<22} {'Speedup':<9} {'Efficiency':<11} Runs"]
    for count, found in speeds.items():
        if not found:
            lines.append(f"{count:<6} {'-':<22} {'-':<9} {'-':<11} {failed[count]} failed")
            continue
        deviation = f" +- {stdev(found):.2f}" if len(found) > 1 else ""
        speedup = mean(found) / mean(good[least])
        efficiency = 100 * speedup * least / count
        ran = f"{len(found)}" + (f", {failed[count]} failed" if count in failed else "")
        throughput = f"{mean(found):.2f}{deviation}"
        lines.append(f"{count:<6} {throughput:<22} {f'{speedup:.2f}x':<9} {f'{efficiency:.1f}%':<11} {ran}")
    if least > 1:
        lines.append(f"Speedup and efficiency are over {least} devices: none ran on fewer.")
    return "\n".join(lines) + "\n"


def _write_table(path: Path, results: list[Result]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    for result in results:
        if result.throughput is not None:
            writer.writerow((result.gpus, result.batch, result.run, result.throughput))
    write_text(path, table.getvalue())


def _plot(results: list[Result], path: Path) -> None:
    from evoplan.planner.reports.plot import plt, save_figure

    speeds: dict[int, list[float]] = {}
    for result in results:
        if result.throughput is not None:
            speeds.setdefault(result.gpus, []).append(result.throughput)
    counts = sorted(speeds)
    means = [mean(speeds[count]) for count in counts]
    errors = [stdev(speeds[count]) if len(speeds[count]) > 1 else 0.0 for count in counts]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.errorbar(counts, means, yerr=errors, marker="o", capsize=3, label="measured")
    axes.plot(counts, [means[0] * count / counts[0] for count in counts], "--", color="gray", label="linear")
    axes.set_xticks(counts)
    axes.set_xlabel("devices")
    axes.set_ylabel("samples per second")
    axes.set_title("TinyOpenFold, the same batch on each device")
    axes.legend()
    figure.tight_layout()
    save_figure(figure, path)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.scaling")
