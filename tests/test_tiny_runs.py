"""`python -m evoplan.experiments.tiny_openfold` as people run it, and the memory of its steps."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evoplan.cost_model.devices import device
from evoplan.experiments.tiny_openfold.memory import measure_parts, measure_peak, plan_for, predict
from evoplan.experiments.tiny_openfold.training import Recipe, TinyTraining
from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import NoPlanError
from evoplan.planner.problems.problem import Problem
from evoplan.planner.processes.world import World
from tests.torchrun import alone, forked, launched, started, torchrun_command

MODULE = ("-m", "evoplan.experiments.tiny_openfold")
SIZES = ("--num-blocks", "1", "--msa-dim", "16", "--pair-dim", "16", "--seq-len", "14", "--num-seqs", "3")
TRAIN = (*MODULE, *SIZES, "--task", "distance")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "performance_summary.json").read_text())


# --- memory ---------------------------------------------------------------------------------

CASES = [
    Recipe(TinyOpenFoldConfig(), InputShape(16, 64, batch=1)),
    Recipe(TinyOpenFoldConfig(n_block=2, c_m=32, c_z=64), InputShape(8, 32, batch=3)),
    Recipe(TinyOpenFoldConfig(n_block=2, c_m=32, c_z=64), InputShape(8, 32, batch=2), amp="bfloat16"),
    Recipe(TinyOpenFoldConfig(n_block=3, c_m=24, c_z=20), InputShape(5, 23, batch=2)),
]


def problem(recipe: Recipe) -> Problem:
    return Problem(model="tiny-openfold", config=recipe.config, shape=recipe.shape)


def measured(recipe: Recipe, plan: Plan | None = None) -> tuple[TinyTraining, int]:
    training = TinyTraining(recipe, World(), plan)
    training.step(training.batch(0))
    return training, measure_peak(training, 1)[0]


# So small that what the loss holds counts.
CASES.append(Recipe(TinyOpenFoldConfig(n_block=1, c_m=64, c_z=12), InputShape(1, 53)))


@pytest.mark.parametrize("recipe", CASES, ids=["default", "tiny", "bfloat16", "odd", "small"])
def test_the_peak_is_predicted(recipe: Recipe) -> None:
    """Asked: within 3 %; the parts too, wherever they are more than odds and ends."""
    training, peak = measured(recipe)
    predicted = predict(recipe, device("cpu"))
    assert predicted.peak_bytes == pytest.approx(peak, rel=0.005)
    found = measure_parts(training, 1, peak, device("cpu"))
    assert sum(found.parts.values()) == found.peak_bytes == peak
    assert sum(predicted.parts.values()) == predicted.peak_bytes
    for name, size in found.parts.items():
        assert predicted.parts[name] == pytest.approx(size, rel=0.02, abs=0.01 * peak), name
    assert min(found.parts.values()) > 0
    assert found.parts["pair_activations"] > found.parts["msa_activations"] > 0


def test_a_plan_halves_the_peak_and_changes_no_loss() -> None:
    recipe = CASES[1]
    plain, peak = measured(recipe)
    plan = plan_for(recipe, problem(recipe), peak // 2)
    predicted = predict(recipe, device("cpu"), plan)
    planned, planned_peak = measured(recipe, plan)
    assert planned.planned
    assert planned_peak <= peak // 2
    assert predicted.peak_bytes == pytest.approx(planned_peak, rel=0.005)
    for number in range(2, 6):
        ours, theirs = (training.step(training.batch(number)).loss for training in (planned, plain))
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert planned.parameters.keys() == plain.parameters.keys()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(TinyOpenFoldConfig(n_block=2, c_m=24, c_z=20), InputShape(3, 9, batch=2)),
        *(pytest.param(case, marks=pytest.mark.slow) for case in (CASES[4], CASES[3])),
    ],
    ids=["even smaller", "small", "odd"],
)
def test_the_least_that_a_step_needs_is_said(recipe: Recipe) -> None:
    """And its plan keeps to it, to the byte."""
    with pytest.raises(NoPlanError) as error:
        plan_for(recipe, problem(recipe), 1)
    least = error.value.least_feasible_bytes
    plan = plan_for(recipe, problem(recipe), least)
    assert predict(recipe, device("cpu"), plan).peak_bytes <= least
    assert measured(recipe, plan)[1] <= least


@pytest.mark.slow
def test_every_budget_is_kept() -> None:
    """Of the whole step, of which the stack that is planned is a part."""
    recipe = CASES[4]
    where, peak = device("cpu"), predict(CASES[4], device("cpu")).peak_bytes
    with pytest.raises(NoPlanError) as error:
        plan_for(recipe, problem(recipe), 1)
    least = error.value.least_feasible_bytes
    for share in (0.0, 0.02, 0.3, 0.7, 0.98):
        budget = int(least + share * (peak - least))
        assert predict(recipe, where, plan_for(recipe, problem(recipe), budget)).peak_bytes <= budget


def test_scores_and_states_are_those_of_the_seed_list() -> None:
    """By hand: softmax weights of 4 blocks, and three copies of the parameters."""
    recipe, c = CASES[0], CASES[0].config
    b, s, r = 1, 16, 64
    scores = 4 * b * (c.n_head_msa * (s * r**2 + r * s**2) + 2 * c.n_head_pair * r**3) * c.n_block
    predicted = predict(recipe, device("cpu"))
    assert predicted.parts["attention_scores"] == pytest.approx(scores, rel=0.01)
    assert predicted.parts["optimizer_states"] == 2 * 4 * (2_653_760 - 4 * 256)


# --- training -------------------------------------------------------------------------------


def test_a_run_and_a_planned_run(tmp_path: Path) -> None:
    done = alone(*TRAIN, "--num-steps", "12", "--profile-dir", str(tmp_path), "--enable-all-profiling")
    assert done.code == 0, done.err
    assert "   Total parameters: 30,064\n" in done.out
    assert "Step  10/12 | Loss: " in done.out
    assert "Attention scores" in done.out
    document = summary(tmp_path)
    assert set(document) >= {
        "version", "timestamp", "config", "profiler_config", "performance_summary", "training_params",
        "system_info",
    }  # fmt: skip
    assert set(document["performance_summary"]) >= {
        "total_samples", "avg_training_speed", "avg_loss", "avg_batch_time", "avg_forward_time",
        "avg_backward_time", "avg_optimizer_time", "peak_memory_mb", "avg_memory_mb",
    }  # fmt: skip
    assert document["config"]["msa_dim"] == 16
    assert len(document["losses"]) == 12
    (trace,) = tmp_path.glob("*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"blocks.0.triangle_outgoing", "attention_scores", "backward", "optimizer"} <= names
    assert "blocks.0.triangle_outgoing" in (tmp_path / "operators.txt").read_text()

    half = int(document["memory"]["measured"]["peak_bytes"] * 0.6)
    done = alone(*TRAIN, "--num-steps", "12", "--profile-dir", str(tmp_path), "--memory", str(half))
    assert done.code == 0, done.err
    planned = summary(tmp_path)
    assert planned["training_params"]["planned"]
    assert planned["performance_summary"]["peak_memory_mb"] * 2**20 <= half
    assert planned["losses"] == pytest.approx(document["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--memory", "1MB"), "the one that needs least takes"),
        (("--memory", "1GB", "--enable-torch-compile"), "leave --enable-torch-compile out"),
        (("--device", "7"), "0 GPUs here"),
        (("--msa-dim", "50"), "no multiple of its 4 heads"),
        (("--resume",), "add --save-every"),
        (("--plan", "nothing.json"), "nothing.json"),
        (("--enable-pytorch-profiler", "--num-steps", "5"), "a profile needs 9 steps"),
        (("--sort-by", "beauty"), "choose one of"),
        (("--learning-rate", "nan"), "not a number"),
        (("--timeout", "nan"), "not a number"),
        (("--amp-dtype", "float16"), "add it"),
        (("--num-blocks", "0"), "num-blocks"),
        (("--profile-dir", "/proc/none"), "/proc/none: cannot be made a folder"),
        (("--profile-dir", "/dev/null"), "/dev/null: cannot be made a folder"),
        (("--save-every", "1", "--snapshots", "/dev/null"), "/dev/null: cannot be made a folder"),
        (("--seq-len", "20000"), "a step needs "),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    if torch.cuda.is_available() and "--device" in arguments:
        pytest.skip("there may be that many")
    folder = ("--profile-dir", str(tmp_path)) if "--profile-dir" not in arguments else ()
    done = alone(*TRAIN, *folder, *arguments)
    assert done.code == (3 if "least" in line else 2), done.err
    (said,) = [text for text in done.err.splitlines() if not text.startswith("USDT:")]
    assert said.startswith("python -m evoplan.experiments.tiny_openfold: ")
    assert line in said
    assert not list(tmp_path.iterdir())


def test_one_residue(tmp_path: Path) -> None:
    """Its distance is 0, and nothing is divided by it."""
    done = alone(*TRAIN, "--seq-len", "1", "--num-steps", "1", "--profile-dir", str(tmp_path))
    assert done.code == 0, done.err


def test_snapshots_that_are_damaged_or_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    saving = ("--save-every", "2", "--snapshots", str(folder), "--profile-dir", str(tmp_path))
    assert alone(*TRAIN, *saving, "--num-steps", "4").code == 0
    second = max(path.name for path in folder.glob("step-*"))
    assert second == "step-00000009"
    done = alone(*TRAIN, *saving, "--num-steps", "4", "--resume")
    assert (done.code, "to go on give more --num-steps" in done.err) == (2, True)
    # What is no snapshot of ours is left alone.
    (folder / "step-old9").mkdir()
    (folder / "step-99999999").mkdir()
    (folder / ".unfinished-8").write_text("")
    for name, content in ((".metadata", b""), (".metadata", b"x" * 20), ("snapshot.json", b"[1]")):
        file = folder / second / name
        before = file.read_bytes()
        file.write_bytes(content)
        done = alone(*TRAIN, *saving, "--num-steps", "6", "--resume")
        assert done.code == 2, done.err
        assert f"{second} is damaged" in done.err
        assert "Traceback" not in done.err
        file.write_bytes(before)
    # Without its description it is unfinished, and the one before counts.
    (folder / second / "snapshot.json").unlink()
    done = alone(*TRAIN, *saving, "--num-steps", "6", "--resume")
    assert done.code == 0, done.err
    assert "Resumed after step 2" in done.out


def steps_saved(snapshots: Path) -> int:
    """Those of the newest complete snapshot."""
    numbers = [path.parent.name.removeprefix("step-") for path in snapshots.glob("step-*/snapshot.json")]
    return max(map(int, numbers), default=0)


def _killed_and_resumed(tmp_path: Path, kills: int, steps: int, seed: int) -> None:
    chance = random.Random(seed)
    flags = ("--num-steps", str(steps))
    whole = alone(*TRAIN, *flags, "--profile-dir", str(tmp_path / "whole"))
    assert whole.code == 0, whole.err
    snapshots = tmp_path / "snapshots"
    saving = (*flags, "--save-every", "2", "--snapshots", str(snapshots))
    saving += ("--resume", "--profile-dir", str(tmp_path / "resumed"))
    for _ in range(kills):
        with forked(*TRAIN, *saving) as process:
            go_on = steps_saved(snapshots) + chance.randint(1, 12)
            while steps_saved(snapshots) < go_on:
                assert process.poll() is None, process.communicate(60)
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.05))  # anywhere in a step or a write
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
    done = alone(*TRAIN, *saving)
    assert done.code == 0, done.err
    assert "Resumed after step" in done.out
    assert summary(tmp_path / "resumed")["losses"] == summary(tmp_path / "whole")["losses"]


def test_killed_and_resumed_loses_nothing(tmp_path: Path) -> None:
    _killed_and_resumed(tmp_path, kills=2, steps=80, seed=1)


@pytest.mark.slow
def test_killed_ten_times_and_resumed_loses_nothing(tmp_path: Path) -> None:
    _killed_and_resumed(tmp_path, kills=10, steps=300, seed=2)


# --- several processes ----------------------------------------------------------------------


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    flags = (*TRAIN, "--num-steps", "6", "--batch-size", "4")
    one = alone(*flags, "--profile-dir", str(tmp_path / "one"))
    two = launched(2, *flags, "--profile-dir", str(tmp_path / "two"), "--enable-memory-profiling")
    assert one.code == two.code == 0, one.err + two.err
    assert "Processes: 2, 2 samples each (DDP)" in two.out
    assert two.out.count("Training completed successfully!") == 1
    ours, theirs = summary(tmp_path / "two"), summary(tmp_path / "one")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    memory = ours["memory"]
    assert memory["predicted"]["peak_bytes"] == pytest.approx(memory["measured"]["peak_bytes"], rel=0.03)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    flags = ("--num-steps", "100000", "--profile-dir", str(tmp_path), "--timeout", "20")
    with started(torchrun_command(2, *TRAIN, *flags)) as launcher:
        for line in launcher.stdout:
            if line.startswith("Step"):
                break
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        out, err = launcher.communicate(timeout=240)
    assert launcher.returncode != 0
    assert "completed" not in out
    assert "died without a word" in err


def test_processes_that_cannot_share_a_batch_are_told(tmp_path: Path) -> None:
    done = launched(2, *TRAIN, "--batch-size", "3", "--profile-dir", str(tmp_path))
    assert done.code != 0
    assert "--batch-size 3 does not divide among 2 processes" in done.err
