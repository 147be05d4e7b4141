"""What a GPU is to tell in one call: the same parts in a small form on the CPU, resumed, and out of time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evoplan.experiments.gpu import capped, parts
from evoplan.experiments.gpu.__main__ import gpu
from evoplan.experiments.gpu.parts import PARTS, Part, run_part
from evoplan.experiments.gpu.results import Results
from evoplan.experiments.gpu.setting import Setting, plan_at
from evoplan.experiments.gpu.worker import run_elsewhere
from evoplan.planner.checking.trial import Trial
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.execution.apply import PlannedModule

SMALL = "--device", "cpu", "--small"


def called(folder: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(gpu, "gpu", [*SMALL, "--out", str(folder), "--cache", str(folder / "t"), *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def only(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--only", name)]


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_memory_is_as_predicted_and_what_needs_a_gpu_is_skipped_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "fidelity-fp32", "fidelity-fp32-expandable", "cap", "offload"
    assert called(tmp_path, *only(*names)) == 0
    said = capsys.readouterr().out
    rows = read(tmp_path / "fidelity-fp32.json")["rows"]
    assert len(rows) == 3
    assert all(f"fidelity-fp32: {name}: predicted" in said for name in rows)
    for row in rows.values():
        assert row["ok"]
        assert row["ratio"] == pytest.approx(1, abs=0.02)
        assert row["reserved_bytes"] is None
        assert row["reserved"] == "only CUDA's allocator reserves"
    assert any(row.get("within_tolerance") for row in rows.values())
    for name in ("cap", "fidelity-fp32-expandable"):
        document = read(tmp_path / f"{name}.json")
        assert "CUDA" in document["skipped"]
        assert f"{name}: skipped: {document['skipped']}" in said
    summary = read(tmp_path / "summary.json")
    assert summary["fidelity"]["fidelity-fp32"]["plans"] == 3
    assert set(summary["skipped"]) == {"cap", "fidelity-fp32-expandable"}
    assert summary["largest_residues_of_plans"][0]["residue_bytes"] <= 0
    for row in read(tmp_path / "offload.json")["rows"].values():
        assert row["moved_bytes"] > 0
        peaks = [run["peak_bytes_above_inputs"] for run in row["runs"].values()]
        assert peaks[1] < peaks[0]
        assert "CUDA" in row["skipped"]
    assert (tmp_path / "fidelity.png").stat().st_size > 1000
    assert (tmp_path / "offload.png").stat().st_size > 1000


def test_without_time_nothing_is_run_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(tmp_path / "new", "--minutes", "0") == 0
    said = capsys.readouterr().out
    assert all(f"{name}: skipped: it would not fit the 0 s that are left" in said for name in PARTS)
    assert "the same command goes on from here" in said
    assert list((tmp_path / "new").iterdir()) == []


def counted(monkeypatch: pytest.MonkeyPatch, fails: str = "") -> list[str]:
    """A part of three runs that cost nothing; the runs that have been called."""
    called_: list[str] = []

    def run(name: str) -> dict[str, Any]:
        called_.append(name)
        if name == fails:
            raise RuntimeError("CUDA error:\nan illegal memory access")
        return {"value": name}

    def runs(_: Setting) -> parts.Runs:
        return {name: lambda name=name: run(name) for name in "abc"}

    monkeypatch.setitem(PARTS, "cap", Part("cap", runs, lambda row: f"value {row['value']}", 1))
    return called_


def test_a_stopped_part_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, ran = Setting("cpu", True), counted(monkeypatch)
    part = PARTS["cap"]
    assert not run_part(part, setting, tmp_path, -1)
    assert ran == []
    results = Results.of(tmp_path, "cap", part.settings(setting))
    results.rows["a"] = {"value": "kept"}
    results.write()
    assert run_part(part, setting, tmp_path, 60)
    assert ran == ["b", "c"]
    found = Results.of(tmp_path, "cap", part.settings(setting))
    assert found.complete
    assert found.rows["a"] == {"value": "kept"}
    # Of other sizes, another device or another torch nothing is taken over.
    assert Results.of(tmp_path, "cap", part.settings(setting) | {"torch": "1.0"}).rows == {}


def test_what_is_there_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = counted(monkeypatch)
    for _ in range(2):
        assert called(tmp_path, *only("cap")) == 0
    assert ran == ["a", "b", "c"]
    assert "cap: all 3 runs are there" in capsys.readouterr().out


def test_a_run_that_fails_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted(monkeypatch, fails="b")
    assert called(tmp_path, *only("cap")) == 1
    captured = capsys.readouterr()
    assert "cap: b: failed: RuntimeError: CUDA error: an illegal memory access\n" in captured.out
    assert captured.err == "failed: cap: b\n"
    ran = counted(monkeypatch)
    assert called(tmp_path, *only("cap")) == 0
    assert ran == ["b"]


def test_a_process_of_its_own_keeps_to_the_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setting = Setting("cpu", True)
    assert run_elsewhere(PARTS["cap"], setting, tmp_path, 120)
    assert "cap: skipped: only CUDA's" in capfd.readouterr().out
    assert not run_elsewhere(PARTS["against"], setting, tmp_path, 0.1)
    assert "against: ended when the time was over" in capfd.readouterr().out


@pytest.mark.parametrize(("needs", "lives_under"), [(1.0, 1.03), (1.05, 1.06), (2.0, None)])
def test_a_cap_that_a_plan_lives_under_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, needs: float, lives_under: float | None
) -> None:
    """With an allocator that is only told: the plan takes so much of its prediction, the plain model more."""
    caps = [2.0**40]
    memory = SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda x: caps.append(x * 2**40))
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 5)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 3})
    problem = Setting("cpu", True).problem((5, 7, 2), "fp32")
    predicted = plan_at(problem, 0.0).predicted.peak_bytes

    def run(trial: Trial) -> None:
        takes = needs * predicted if isinstance(trial.module, PlannedModule) else 3 * predicted
        if takes > caps[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr(Trial, "run", run)
    row = capped.capped(problem, 0.0)
    assert row["cap_over_predicted"] == lives_under
    assert row["at_first_cap"] == ("lives" if needs <= 1.03 else "CUDA out of memory")
    assert row["plain"] == "CUDA out of memory"
    assert caps[-1] == 2**40
    assert row.get("retries") == (None if lives_under is None else 3)
    said = capped.in_words(row)
    assert ("dies under every cap" if lives_under is None else f"lives under {lives_under:.2f}") in said
    assert "the plain model dies under 1.03" in said


def test_the_allocator_s_setting_and_the_time_are_told_to_that_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[list[str], dict[str, Any]]] = []

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        told.append((command, how))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("cap", "cap-expandable"):
        assert run_elsewhere(PARTS[name], Setting("cuda", False, "times"), tmp_path, 100)
    for (command, how), expandable in zip(told, (False, True), strict=True):
        assert how["env"]["PYTORCH_CUDA_ALLOC_CONF"] == f"expandable_segments:{expandable}"
        assert how["timeout"] == 100
        assert 0 < float(command[command.index("--seconds") + 1]) < 100
        assert command[-2:] == ["--cache", "times"]
        assert "--small" not in command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(gpu, "gpu", ["--out", str(tmp_path / "new")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "gpu: no CUDA device here; use --device cpu, or a machine that has one\n"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_all_of_it_in_its_small_form(tmp_path: Path) -> None:
    assert called(tmp_path, "--minutes", "60") == 0
    documents = {name: read(tmp_path / f"{name}.json") for name in PARTS}
    assert all(document["complete"] for document in documents.values())
    for row in documents["against"]["rows"].values():
        assert [pair["against"] for pair in row["comparisons"][:2]] == ["small", "large"]
        assert all(pair["peak_ratio"] <= 1.001 for pair in row["comparisons"])
    for row in documents["residues"]["rows"].values():
        assert all(phase["residue_bytes"] <= 512 for phase in row["phases"])
    kernels = documents["kernels"]["rows"]
    tiled = [row for name, row in kernels.items() if "tiled" in name]
    assert tiled
    assert all(row["kernels"][0]["seconds"] > 0 for row in tiled)


@pytest.mark.gpu
def test_a_gpu_s_figures_in_one_call(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evoplan.experiments.gpu", "--small", "--out", str(tmp_path)]
    command += ["--cache", str(tmp_path / "times"), *only(*(name for name in PARTS if name != "against"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    for expandable in (False, True):
        document = read(tmp_path / f"fidelity-fp32{'-expandable' * expandable}.json")
        for row in document["rows"].values():
            assert row["expandable_segments"] is expandable
            assert row["allocated_bytes"] <= row["reserved_bytes"]
            assert row["ok"]
    assert all(row["cap_over_predicted"] for row in read(tmp_path / "cap-expandable.json")["rows"].values())
