"""`python -m evoplan.experiments.scaling` and `python -m evoplan.experiments.flops` as people run them."""

from __future__ import annotations

import csv
import json
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from evoplan.experiments.flops import several
from evoplan.experiments.flops.__main__ import command as flops
from evoplan.experiments.flops.output import print_several
from evoplan.experiments.scaling import Result, _descendants, command, summarise
from evoplan.experiments.tiny_openfold.__main__ import command as tiny_openfold
from tests.torchrun import alone, environment, forked
from tests.warm import Child

STUDY = ("-m", "evoplan.experiments.scaling")
SIZES = ["--num-blocks", "1", "--seq-len", "12", "--num-seqs", "3", "--batch-size", "1", "--num-steps", "2"]


@pytest.mark.slow
def test_a_scaling_study(tmp_path: Path) -> None:
    """1 and 2 processes."""
    sizes = ("--seq-len", "12", "--num-seqs", "3", "--num-blocks", "1")
    study = (*STUDY, "--gpus", "1 2", "--batch-per-gpu", "1", "--steps", "3", *sizes)
    done = alone(*study, "--output-dir", str(tmp_path / "study"))
    assert done.code == 0, done.err + done.out
    with (tmp_path / "study" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["num_gpus"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["num_gpus", "batch_size", "run", "throughput_samples_per_sec"]
    for name in ("config.txt", "summary.txt", "scaling.png", "gpu1_batch1_run1.log", "gpu2_batch2_run1.log"):
        assert (tmp_path / "study" / name).stat().st_size > 0
    assert "Efficiency" in done.out


# In python's place: a run of one device comes to figures, one of two says why it does not.
RUNS = """#!/bin/sh
case "$*" in
*gpu1_*)
    folder=$(echo "$*" | sed 's/.*--profile-dir \\([^ ]*\\).*/\\1/')
    mkdir "$folder"
    echo '{"performance_summary": {"avg_training_speed": 3.0}}' > "$folder/performance_summary.json"
    ;;
*)
    echo "python -m evoplan.experiments.tiny_openfold: a file is in the way"
    exit 2
    ;;
esac
"""


def test_a_run_that_fails_is_reported_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What starts and ends a run is the study's own; the runs are made up."""
    runs = tmp_path / "runs"
    runs.write_text(RUNS)
    runs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(runs))
    study = ["--gpus", "2 1", "--steps", "2", "--batch-per-gpu", "1", "--output-dir", str(tmp_path)]
    done = CliRunner().invoke(command, study)
    assert done.exit_code == 1
    assert "2 x 1 samples, run 1: failed: a file is in the way (see " in done.output
    assert "1 x 1 samples, run 1: 3.00 samples/sec" in done.output
    assert "1 failed" in (tmp_path / "summary.txt").read_text()
    assert (tmp_path / "summary.csv").read_text().count("\n") == 2


@pytest.mark.parametrize(("gpus", "counts"), [(0, "1 2 4 8"), (1, "1"), (3, "1 2"), (8, "1 2 4 8")])
def test_a_study_takes_as_many_devices_as_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, counts: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(
        "evoplan.experiments.scaling._run", lambda _, count, batch, run, *rest: Result(count, batch, run, 1.0)
    )
    done = CliRunner().invoke(command, ["--steps", "2", "--output-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert f"gpus: {counts}\n" in (tmp_path / "config.txt").read_text()


def test_a_study_that_is_ended_leaves_no_run_behind(tmp_path: Path) -> None:
    sizes = ("--seq-len", "8", "--num-seqs", "2", "--num-blocks", "1")
    study = (*STUDY, "--gpus", "1", "--steps", "1000000", *sizes, "--output-dir", str(tmp_path))
    with forked(*study) as process:
        deadline = time.time() + 240
        while "Step" not in "".join(path.read_text() for path in tmp_path.glob("*.log")):
            assert time.time() < deadline
            time.sleep(0.2)
        family = _descendants(process.pid)
        assert len(family) >= 2  # torchrun and what it has started
        process.terminate()
        process.wait(120)
        while [pid for pid in family if Path(f"/proc/{pid}").exists()]:
            assert time.time() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("flags", "rank", "started"),
    [
        ([], None, True),
        (["--device", "cpu"], None, False),
        (["--no-data-parallel"], None, False),
        ([], "0", False),  # torchrun has started this one
    ],
)
def test_several_gpus_have_a_process_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], rank: str | None, started: bool
) -> None:
    """With GPUs that are not there: what is started is recorded, and nothing else happens."""
    commands: list[list[str]] = []

    class Ended(Exception):
        pass

    def instead(program: str, command: list[str]) -> None:
        commands.append(command)
        raise Ended

    def alone(*_: Any) -> None:
        raise Ended

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.execv", instead)
    monkeypatch.setattr("evoplan.planner.processes.world.joined", alone)
    monkeypatch.setattr(sys, "argv", ["tiny", "--batch-size", "6", *flags])
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    asked = ["--batch-size", "6", *flags, "--profile-dir", str(tmp_path)]
    done = CliRunner().invoke(tiny_openfold, asked)
    assert isinstance(done.exception, Ended)
    assert bool(commands) == started
    if started:
        assert commands[0][2:5] == ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        assert commands[0][-2:] == ["--batch-size", "6"]
        odd = CliRunner().invoke(tiny_openfold, ["--batch-size", "5", "--profile-dir", str(tmp_path)])
        assert "does not divide among 2 GPUs" in str(odd.exception)


def test_rates_on_a_cpu_are_not_zero(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "num_gpus": 2, "total_system_tflops": 3.1e-4, "avg_mfu_percent": 1.0, "mfu_std_dev": 0.0,
        "total_throughput": 5.0, "multi_gpu_efficiency_percent": 50.0,
    }  # fmt: skip
    print_several({"aggregate_metrics": found, "comparison": {"speedup": 1.0}})
    assert "Total System MFLOPS: 310\n" in capsys.readouterr().out


def test_summary_of_runs() -> None:
    results = [
        Result(1, 4, 1, 10.0), Result(1, 4, 2, 12.0), Result(2, 8, 1, 16.5), Result(2, 8, 2, None, "x"),
        Result(4, 16, 1, None, "y"),
    ]  # fmt: skip
    lines = summarise(results).splitlines()
    assert lines[1].split() == ["1", "11.00", "+-", "1.41", "1.00x", "100.0%", "2"]
    assert lines[2].split() == ["2", "16.50", "1.50x", "75.0%", "1,", "1", "failed"]
    assert lines[3].split()[:2] == ["4", "-"]


# --- FLOPs ----------------------------------------------------------------------------------


def test_flops_from_the_command_line(tmp_path: Path) -> None:
    done = alone("-m", "evoplan.experiments.flops", *SIZES, "--all", "--output-dir", str(tmp_path))
    assert done.code == 0, done.err
    profile = json.loads((tmp_path / "flops_profile.json").read_text())
    assert set(profile) == {
        "model_info", "profiling_config", "flops_analysis", "performance_metrics", "efficiency_metrics",
        "step_by_step_results", "timestamp",
    }  # fmt: skip
    analysis = profile["flops_analysis"]
    assert sum(analysis["evoformer_breakdown"].values()) == analysis["total_flops"]
    assert analysis["total_flops"] == analysis["avg_flops_per_step"]
    assert analysis["counters"]["analytic"] == analysis["counters"]["flop_counter_mode"]
    assert {row["flops"] for row in profile["step_by_step_results"]} == {analysis["total_flops"]}
    assert 0 < profile["efficiency_metrics"]["mfu_percent"] < 100
    intensity = json.loads((tmp_path / "computational_intensity.json").read_text())
    assert intensity["memory_bound_vs_compute_bound"] in ("memory_bound", "compute_bound")
    roofline = json.loads((tmp_path / "roofline_data.json").read_text())
    assert roofline["optimization_targets"][0].keys() == {"target", "reason", "expected_improvement"}
    assert (tmp_path / "roofline.png").stat().st_size > 0


class Fork(Child):
    """In the place of a process that flops of several devices starts."""

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        super().__init__(command[1:], environment() | env)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        with closing(self):
            return super().communicate(timeout)


@pytest.mark.slow
def test_flops_of_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(several, "subprocess", SimpleNamespace(Popen=Fork, DEVNULL=None, PIPE=None))
        done = CliRunner().invoke(flops, [*SIZES, "--devices", "0,1", "--output-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "flops_profile_multi_gpu.json").read_text())
    found, comparison = document["aggregate_metrics"], document["comparison"]
    assert found["num_gpus"] == 2
    assert comparison["speedup"] == pytest.approx(
        comparison["multi_gpu_throughput"] / comparison["single_gpu_throughput"]
    )
    assert found["multi_gpu_efficiency_percent"] == pytest.approx(50 * comparison["speedup"])
    done = alone("-m", "evoplan.experiments.flops", *SIZES, "--devices", "a", "--output-dir", str(tmp_path))
    assert done.code == 2
    assert "give different numbers of GPUs" in done.err
