"""Where times come from: rooflines, a cache that survives crashes, calibrations, device files."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import evoplan
from evoplan.cost_model.calibrate import REACH, Calibration, fit
from evoplan.cost_model.devices import DEVICES, DTYPES, Device, Link, device
from evoplan.cost_model.local import named
from evoplan.cost_model.roofline import bounds, seconds
from evoplan.cost_model.times_cache import MissingTimesError, TimesCache, Timing, key_of
from evoplan.cost_model.trace import Work
from evoplan.model import EvoformerConfig
from evoplan.model.config import InputShape
from evoplan.model.running.chain import Chain
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.checking.profiling import profile_problem
from evoplan.planner.commands.cli import main
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.costing import cost_problem, planned_model
from evoplan.planner.problems.device_file import device_entry, load_device
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import cost_with_times, time_source
from evoplan.planner.schedules.schedule import strategies_used
from evoplan.planner.solvers.confirming import confirmed
from tests.torchrun import forked

CONFIG = EvoformerConfig(n_block=2, c_m=16, c_z=16, n_head_msa=2, n_head_pair=2, c_head=8, c_opm=4, c_tri=16)
PROBLEM = Problem(model="custom", config=CONFIG, shape=InputShape(6, 9))


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and everything printed."""
    try:
        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache with the times of PROBLEM."""
    path = str(tmp_path_factory.mktemp("times") / "below" / "times.sqlite")
    profile_problem(PROBLEM, path, repeats=1, max_pieces=2)
    return path


# --- roofline -------------------------------------------------------------------------------


def test_bounds_by_hand() -> None:
    work = Work()
    work.kernels[(4000, 100)] += 2  # 40 s of arithmetic, 10 s of traffic each
    work.kernels[(0, 300)] += 1  # 30 s of traffic
    work.collectives[(50, 2)] += 1
    machine = replace(
        device("a100-40gb"),
        peak_flops={"float32": 100.0},
        bandwidth=10.0,
        launch_seconds=1.0,
        link=Link(10, 3),
    )
    found = bounds(work, machine, "float32")
    assert (found.flops, found.bytes, found.launches, found.sent_bytes) == (8000, 500, 4, 50)
    assert (found.math_seconds, found.memory_seconds, found.comms_seconds) == (80, 50, 11)
    assert found.intensity == 16
    assert found.lower_seconds == 80
    assert found.upper_seconds == 80 + 50 + 11 + 4
    assert found.predicted_seconds == seconds(work, machine, "float32") == 40 + 40 + 30 + 3 + 11 + 1
    assert found.bound == "compute"


@pytest.mark.parametrize("name", list(DEVICES))
def test_every_device_has_all_figures_and_bounds_hold(name: str) -> None:
    machine = device(name)
    assert set(machine.peak_flops) == set(DTYPES)
    assert machine.source
    assert machine.bandwidth > 0
    assert machine.link.bandwidth > 0
    costed = cost_problem(PROBLEM.model_copy(update={"device": name}))
    for options in costed.table.options:
        for cost in options:
            for work in (cost.discard_work, cost.forward_work, cost.backward_work):
                found = bounds(work, machine, "float32")
                assert found.lower_seconds <= found.predicted_seconds * (1 + 1e-9)
                assert found.predicted_seconds <= found.upper_seconds * (1 + 1e-9)


def test_roofline_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "roofline.json"
    shape = ["--n-blocks", "1", "--n-seq", "16", "--n-res", "24"]
    code, printed = run(["roofline", *shape, "--device", "h100-80gb", "--json", str(path)], capsys)
    assert code == 0
    assert "outer_product_mean" in printed
    assert "989" not in printed.partition("h100-80gb:")[0]
    document = json.loads(path.read_text())
    row = document["rows"][0]
    assert {"flops", "bytes", "launches", "math_seconds", "memory_seconds", "comms_seconds"} <= set(row)
    assert row["intensity"] == row["flops"] / row["bytes"]
    assert {row["phase"] for row in document["rows"]} == {"discard", "forward", "backward"}


# --- devices of one's own -------------------------------------------------------------------


ENTRY = {
    "name": "mine",
    "memory": "3GiB",
    "peak_flops": {"float32": 1e13},
    "bandwidth": 1e12,
    "source": "made up",
}


def test_a_device_file_is_planned_for_and_kept_in_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, out = tmp_path / "mine.json", tmp_path / "plan.json"
    path.write_text(json.dumps(ENTRY))
    shape = ["--n-blocks", "1", "--n-seq", "16", "--n-res", "24"]
    code, printed = run(["plan", *shape, "--device", str(path), "--out", str(out)], capsys)
    assert code == 0, printed
    assert "on mine, budget 3 GiB" in printed
    path.unlink()
    code, printed = run(["verify", str(out), "--simulate"], capsys)
    assert code == 0, printed


def test_a_device_file_holds_what_a_device_is(tmp_path: Path) -> None:
    for machine in DEVICES.values():
        path = tmp_path / f"{machine.name}.json"
        path.write_text(json.dumps(device_entry(machine)))
        assert load_device(path) == machine


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bandwidth": -1}, "bandwidth: Input should be greater than or equal to 1"),
        ({"memory": "3 apples"}, "memory: "),
        ({"peak_flops": {"float31": 1.0}}, "peak_flops: unknown dtype 'float31'"),
        ({"source": None}, "source: "),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"bandwidth": True}, "mine.json: bandwidth: Input should be a valid number"),
        ({"launch_seconds": "5e-6"}, "mine.json: launch_seconds: Input should be a valid number"),
        ({"memory": True}, "mine.json: memory: Input should be a valid integer"),
        ({"name": "a\nb"}, "mine.json: name: String should match"),
        ({"peak_flops": {"float16": 1e12}}, "device mine has no peak_flops for float32"),
        (None, "mine.json: Invalid JSON"),
    ],
    ids=str,
)
def test_a_wrong_device_file_is_one_line(
    change: dict | None, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{" if change is None else json.dumps(ENTRY | change))
    code, printed = run(
        ["plan", "--n-blocks", "1", "--n-seq", "8", "--n-res", "8", "--device", str(path)], capsys
    )
    assert code == 2
    assert said in printed
    assert len(printed.strip().splitlines()) == 1


# --- measured times -------------------------------------------------------------------------


def test_a_profile_is_planned_with(cache: str) -> None:
    costed = cost_with_times(PROBLEM, "auto", cache)
    assert costed.sources["time"] == "measured"
    plan = solve(costed)
    assert plan.costs["time"] == "measured"
    here = TimesCache(cache, "cpu")
    for step, options in zip(Chain.of(costed.model).steps, costed.table.options, strict=True):
        assert all(option.strategy.n <= 2 for option in options)  # what was not measured is not offered
        for option in options:
            key = key_of(step, PROBLEM.state_shapes(), "float32", option.strategy)
            found = here.get(key)
            assert found is not None
            assert option.backward_seconds == found.backward > 0
            assert option.forward_seconds == found.forward > 0
            assert option.discard_seconds == found.discard > 0


def test_times_are_for_what_they_were_measured_on(cache: str) -> None:
    other = PROBLEM.model_copy(update={"shape": InputShape(6, 10)})
    with pytest.raises(MissingTimesError, match=r"row_attention: no measured time .* run `evoplan profile`"):
        cost_with_times(other, "measured", cache)
    assert cost_with_times(other, "auto", cache).sources["time"] == "calibrated"
    half = PROBLEM.model_copy(update={"dtype": "bfloat16"})
    assert cost_with_times(half, "auto", cache).sources["time"] == "roofline"
    with pytest.raises(MissingTimesError, match="no calibrated times for cpu in bfloat16"):
        cost_with_times(half, "calibrated", cache)
    elsewhere = PROBLEM.model_copy(update={"device": "t4-16gb"})
    assert cost_with_times(elsewhere, "auto", cache).sources["time"] == "roofline"
    shared = PROBLEM.model_copy(update={"ranks": 2})
    assert cost_with_times(shared, "auto", cache).sources["time"] == "calibrated"
    with pytest.raises(MissingTimesError, match="on 2 ranks"):
        cost_with_times(shared, "measured", cache)
    blocks = PROBLEM.model_copy(update={"config": replace(CONFIG, n_block=5)})
    assert cost_with_times(blocks, "auto", cache).sources["time"] == "measured"


def test_what_the_cache_has_is_not_measured_again(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evoplan.planner.checking.profiling.time_step", None)  # calling it fails
    measured, _, _ = profile_problem(PROBLEM, cache, repeats=1, max_pieces=2)
    assert all(row.timing for row in measured if row.cost)


def test_all_strategies_of_a_step_are_timed_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed later is timed beside a whole run, by which the machine was twice as fast before."""
    path, asked, slower = str(tmp_path / "times.sqlite"), [], 1.0

    def timed(step, strategies, *_):
        asked.append([str(strategy) for strategy in strategies])
        return {s: Timing(*[slower * (1.0 if s == WHOLE else 3.0)] * 4, 0.0) for s in strategies}

    monkeypatch.setattr("evoplan.planner.checking.profiling.time_step", timed)
    monkeypatch.setattr("evoplan.planner.checking.profiling._Profiler.confirm", lambda *_: None)
    profile_problem(PROBLEM, path, repeats=1, max_pieces=1)
    columns = next(strategies for strategies in asked if "whole+sdpa" in strategies)  # has no bias
    assert {"whole", "lean", "whole+tiled(2MiB)"} < set(columns)
    assert len(asked) == len(cost_problem(PROBLEM).table.options) // 2  # two blocks that are alike

    asked.clear()
    slower = 2.0
    measured, _, _ = profile_problem(PROBLEM, path, repeats=1, max_pieces=2)
    assert asked
    assert all(strategies[0] == "whole" and strategies.count("whole") == 1 for strategies in asked)
    assert {row.timing.discard for row in measured if row.timing} == {1.0, 3.0}


def test_what_plans_choose_is_timed_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that was measured too low by chance is not what a plan hangs on."""
    path, asked = str(tmp_path / "times.sqlite"), []

    def timed(step, strategies, state, constants, repeats, *_):
        """True times, twice as slow from the second pass on; the first time chunks come out at a tenth."""
        asked.append(repeats)
        slower = 1.0 if repeats == 1 else 2.0
        times = {}
        for strategy in strategies:
            lucky = 0.1 if repeats == 1 and strategy.kind == "chunk" else 1.0
            true = 1.0 if strategy == WHOLE else 1.5 if strategy.kind == "lean" else 3.0
            times[strategy] = Timing(*(lucky * slower * true * t for t in (1.0, 1.0, 2.0, 1.0)), 0.0)
        return times

    monkeypatch.setattr("evoplan.planner.checking.profiling.time_step", timed)
    measured, _, _ = profile_problem(PROBLEM, path, repeats=1, max_pieces=2)
    assert set(asked) == {1, 2}
    fastest = solve(cost_with_times(PROBLEM, "measured", path))
    used = {str(s) for strategies in strategies_used(fastest.schedule).values() for s in strategies}
    assert used == {"whole"}
    for row in measured:
        if row.strategy.kind == "chunk" and row.timing is not None and row.timing.discard > 1:
            assert row.timing.discard == pytest.approx(3.0)  # as slow beside whole as it is
            break
    else:
        raise AssertionError("no chunk was timed again")


def test_what_was_too_large_to_be_timed_is_not_timed_again() -> None:
    """Of each step the table has the calibration's time of a whole run, which plans with room choose."""
    table, asked = cost_with_times(PROBLEM, "roofline").table, []

    def again(step: int, costs: list) -> list:
        asked.extend(cost.strategy for cost in costs)
        return costs

    found, chosen = confirmed(table, again, able=lambda step, strategy: strategy != WHOLE)
    assert asked
    assert WHOLE not in asked
    assert all(WHOLE not in strategies for strategies in chosen.values())
    assert found == table


def test_inference_has_times_of_its_own(tmp_path: Path) -> None:
    problem = PROBLEM.model_copy(update={"mode": "inference"})
    path = str(tmp_path / "times.sqlite")
    profile_problem(problem, path, repeats=1, max_pieces=1)
    costed = cost_with_times(problem, "measured", path)
    assert all(o.discard_seconds > 0 and o.backward_seconds == 0 for o in costed.table.options[0])
    with pytest.raises(MissingTimesError):
        cost_with_times(PROBLEM, "measured", path)


def test_a_killed_writer_leaves_the_cache_whole(tmp_path: Path) -> None:
    path = tmp_path / "times.sqlite"
    code = f"import sys; from tests.test_times import put_many\nput_many({str(path)!r})"
    for _ in range(3):
        with forked("-c", code) as writer:
            assert writer.stdout is not None
            for _ in range(5):
                assert writer.stdout.readline()
            writer.kill()
            assert writer.wait(60) == -signal.SIGKILL
        with sqlite3.connect(path) as connection:
            assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
            (rows,) = connection.execute("select count(*) from times").fetchone()
        connection.close()
        assert rows >= 5


def put_many(path: str) -> None:
    """Write times until somebody stops it."""
    cache, costed = TimesCache(path, "cpu"), cost_problem(PROBLEM)
    step = Chain.of(planned_model(PROBLEM)).steps[0]
    cost = costed.table.options[0][0]
    for number in range(10**6):
        shapes = {name: (*shape, number) for name, shape in PROBLEM.state_shapes().items()}
        cache.put(key_of(step, shapes, "float32", cost.strategy), Timing(1.0, 2.0, 3.0, 2.0, 0.1), cost)
        print(number, flush=True)


def test_a_file_that_is_no_cache_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("this is not a cache of times, though it is long enough to be taken for a file\n" * 20)
    shape = ["--n-blocks", "1", "--n-seq", "8", "--n-res", "8"]
    for command in (["plan", "--times", "auto"], ["profile"]):
        code, printed = run([*command, *shape, "--cache", str(path)], capsys)
        assert code == 2
        assert f"{path}: is no cache of times" in printed.replace("\n", "")
    assert path.read_text().startswith("this is not")


@pytest.mark.parametrize(
    "damage",
    [
        "update times set forward = 'x'",
        "update times set backward = -5",
        "update times set discard = 9e999",
        "update times set unread = -1",
        "update times set bytes = '[1, 2]' where bytes is not null",
        "update times set bytes = '[-1, 1, 1, 1]' where bytes is not null",
        "update times set bytes = '[1.5, 1, 1, 1]' where bytes is not null",
        "update times set discard = 0.0, forward = 0.0, backward = 0.0",
        "update times set work = 'zzz'",
        """update times set work = '[[["a", 1, 1]], [], []]'""",
        "update times set work = '[[[1, -1, 1]], [], []]'",
        "drop table times",
    ],
)
def test_a_damaged_cache_is_named(damage: str, cache: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"damaged\.sqlite: is no cache of times"):
        profile_problem(PROBLEM, str(_damaged(cache, damage, tmp_path)), repeats=1, max_pieces=2)


def _damaged(cache: str, damage: str, tmp_path: Path, *values: str) -> Path:
    path = tmp_path / "damaged.sqlite"
    path.write_bytes(Path(cache).read_bytes())
    with sqlite3.connect(path) as connection:
        connection.execute(damage, values)
    return path


def test_a_damaged_calibration_is_named(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"flops": 1e9, "bandwidth": 1e9, "launch_seconds": 1e-6, "error": 0.1, "rows": 12}
    wrong = (None, "fast", -1.0, 0.0, float("nan"), float("inf"), True, [])
    damaged: list[Any] = [whole | {name: value} for name in whole for value in wrong]
    damaged.remove(whole | {"error": 0.0})  # a fit may be exact
    damaged += [{key: whole[key] for key in whole if key != name} for name in whole]
    damaged += [[], 3, None, whole | {"more": 1.0}]
    says = r"damaged\.sqlite: is no cache of times .*; delete it, or name another"
    for constants in damaged:
        text = json.dumps(constants)
        path = _damaged(cache, "update calibrations set constants = ?", tmp_path, text)
        with pytest.raises(ValueError, match=says):
            time_source(PROBLEM, "calibrated", str(path))
    monkeypatch.setenv("EVOPLAN_CACHE", str(path))
    with pytest.raises(ValueError, match=says):
        evoplan.fit(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.zeros(2, 4),))


def test_profile_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache, saved, result = (str(tmp_path / name) for name in ("t.sqlite", "here.json", "result.json"))
    shape = ["--n-blocks", "1", "--n-seq", "6", "--n-res", "8", "--c-m", "16", "--c-z", "16"]
    arguments = ["profile", *shape, "--cache", cache, "--repeats", "1", "--max-pieces", "1"]
    code, printed = run([*arguments, "--save-device", saved, "--json", result], capsys)
    assert code == 0, printed
    assert printed.count(": times of ") == 9  # a line for each submodule
    assert "calibrated:" in printed
    rows = json.loads(Path(result).read_text())["times"]
    assert {"lean", "whole"} <= {row["strategy"] for row in rows}
    here = load_device(saved)
    fitted = json.loads(Path(result).read_text())["calibration"]
    assert (here.kind, here.name) == ("cpu", "cpu-calibrated")
    assert here.peak_flops == {**DEVICES["cpu"].peak_flops, "float32": fitted["flops"]}
    assert f"float32 FLOP/s, bandwidth and launch_seconds fitted to {fitted['rows']} times" in here.source
    assert DEVICES["cpu"].source in here.source  # of what is not fitted
    code, printed = run(["plan", *shape, "--cache", cache, "--times", "measured"], capsys)
    assert code == 0
    assert "time measured" in printed
    for wrong in (["--device", "a100-40gb"], ["--ranks", "2"]):
        code, printed = run([*arguments, *wrong], capsys)
        assert code == 2
        assert "times are measured" in printed


# --- calibration ----------------------------------------------------------------------------


def test_calibration_finds_the_constants_that_made_the_times() -> None:
    true = replace(DEVICES["cpu"], peak_flops={"float32": 3e11}, bandwidth=4e10, launch_seconds=2e-5)
    measured = []
    for flops, moved, count in [(10**a, 10**b, c) for a in (6, 8, 10) for b in (5, 7, 9) for c in (1, 10)]:
        work = Work()
        work.kernels[(flops, moved)] += count
        work.kernels[(0, moved // 3)] += 2
        measured.append((work, seconds(work, true, "float32")))
    found = fit(measured, DEVICES["cpu"], "float32")
    assert found.flops == pytest.approx(3e11, rel=0.02)
    assert found.bandwidth == pytest.approx(4e10, rel=0.02)
    assert found.launch_seconds == pytest.approx(2e-5, rel=0.02)
    assert found.error < 0.01
    applied: Device = Calibration(**found.to_json()).applied(DEVICES["cpu"], "float32")
    assert applied.peak_flops["float32"] == found.flops
    assert applied.peak_flops["float64"] == DEVICES["cpu"].peak_flops["float64"]
    with pytest.raises(ValueError, match="too few to calibrate"):
        fit(measured[:5], DEVICES["cpu"], "float32")


def test_a_figure_that_bounds_nothing_stays_within_reach() -> None:
    """Small kernels on a busy machine take as long whatever they move: their bandwidth could be any."""
    sheet = DEVICES["cpu"]
    busy = np.random.default_rng(1).uniform(1, 3, 24)
    works = [Work(Counter({(0, 2**25 * n): 40, (10 * n, n): 5})) for n in range(1, 25)]
    measured = [
        (work, 1e-4 * wait / n**0.5) for n, (work, wait) in enumerate(zip(works, busy, strict=True), 1)
    ]
    found = fit(measured, sheet, "float32")
    for figure, of_sheet in (
        (found.bandwidth, sheet.bandwidth),
        (found.flops, sheet.peak_flops["float32"]),
        (found.launch_seconds, sheet.launch_seconds),
    ):
        assert of_sheet / REACH * 0.999 <= figure <= of_sheet * REACH * 1.001


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40gb"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24gb"),
        ("NVIDIA H200", 139.8, "h200-141gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80gb"),
        ("NVIDIA L4", 22.0, "l4-24gb"),
        ("NVIDIA L40S", 44.4, None),
        ("AMD Instinct MI250X/MI250", 64.0, "mi250x-64gb"),
        ("AMD Instinct MI300X", 192.0, "mi300x-192gb"),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, gib: float, key: str | None) -> None:
    found = named(name, int(gib * 2**30))
    assert (found.name if found else None) == key
