"""Plans under torchrun: replicas and ranks train as one process does, and no failure hangs or is silent."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.console import Console

from evoplan.model.config import InputShape
from evoplan.planner.plans.plan import Plan, load_plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.processes.identity import odd_ones
from evoplan.planner.processes.watch import Failure, Member, verdict
from evoplan.planner.processes.world import World
from evoplan.planner.runs.data import alignment_for, batch_for
from evoplan.planner.runs.run import Settings, run_plan
from evoplan.planner.runs.training import Training, dropout_seed
from evoplan.planner.solvers import BASELINES
from tests.conftest import TINY
from tests.torchrun import FAULTY, Done, alone, launched, started, torchrun, torchrun_command

STEPS = 4
# Above a rank's death: to notice it (SIGTERM or the timeout), to name it, and for torchrun to end.
TIMEOUT, LEAVE = 5.0, 25.0


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The file of a plan for so many ranks, with recomputation."""
    folder = tmp_path_factory.mktemp("plans")

    def make(ranks: int) -> str:
        shape = InputShape(5, 7)  # 2 divides neither
        problem = Problem(model="custom", config=TINY, shape=shape, dtype="float64", ranks=ranks)
        costed = cost_problem(problem)
        large = costed.predict(BASELINES["large"](costed.table)).peak_bytes
        budgeted = problem.model_copy(update={"budget_bytes": large})
        path = folder / f"plan{ranks}.json"
        solve(replace(costed, problem=budgeted)).save(path)
        return str(path)

    return cache(make)


def replicas_by_hand(plan: Plan, replicas: int) -> list[float]:
    """Losses of one process that averages the gradients of all replicas' batches."""
    training = Training(plan, World(), seed=0, learning_rate=1e-2)
    alignment = alignment_for(plan.problem, None, 0)
    losses = []
    for index in range(STEPS):
        totals = [torch.zeros_like(p) for p in training.parameters.values()]
        loss = 0.0
        for number in range(index * replicas, (index + 1) * replicas):
            batch = batch_for(plan.problem, alignment, number)
            loss += training.step(batch, dropout_seed(0, number)) / replicas
            for total, parameter in zip(totals, training.parameters.values(), strict=True):
                total += parameter.grad / replicas
        for total, parameter in zip(totals, training.parameters.values(), strict=True):
            parameter.grad.copy_(total)
        training.update()
        losses.append(loss)
    return losses


@pytest.mark.parametrize(
    ("ranks", "replicas"),
    [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_a_world_trains_as_one_process(
    plan: Callable[[int], str], tmp_path: Path, ranks: int, replicas: int
) -> None:
    path = tmp_path / "run.json"
    flags = ["--steps", str(STEPS), "--replicas", str(replicas), "--learning-rate", "1e-2"]
    size = ranks * replicas
    done = torchrun(size, "-m", "evoplan.planner", "run", plan(ranks), *flags, "--json", str(path))
    assert done.code == 0, done.err
    assert done.out.count("step 1:") == 1
    found = json.loads(path.read_text())
    expected = replicas_by_hand(load_plan(plan(1)), replicas)
    assert found["losses"] == pytest.approx(expected, rel=1e-9)
    assert len(set(found["losses"])) == STEPS
    assert [row["rank"] for row in found["ranks"]] == list(range(size))
    for row in found["ranks"]:
        print(row)
        assert row["measured_peak_bytes"] == pytest.approx(row["predicted_peak_bytes"], rel=1e-3)
        assert row["step_seconds"] > 0


def faulty(plan: str, fault: str, rank: int = 1, at: int = 2, size: int = 2) -> Done:
    """Torchrun itself notices a death; what follows from other faults is the same without it."""
    flags = ["--steps", str(STEPS), "--replicas", str(size), "--timeout", str(TIMEOUT)]
    start = torchrun if fault == "killed" else launched
    return start(size, FAULTY, fault, str(rank), str(at), "run", plan, *flags)


@pytest.mark.parametrize(
    ("fault", "rank", "size", "line"),
    [
        ("killed", 1, 2, r"rank 1 \(pid \d+, .+\) died without a word"),
        ("stopped", 1, 2, r"rank 1 \(pid \d+, .+\) does not answer"),
        ("nan", 1, 2, r"rank 1 \(pid \d+, .+\): the loss of step 2 is nan there alone"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("killed", 0, 3, r"rank 0 \(pid \d+, .+\) died without a word"),
                ("stopped", 0, 3, r"rank 0 \(pid \d+, .+\) does not answer"),
                ("stuck", 1, 3, r"rank 1 \(pid \d+, .+\) does not take part"),
                ("drift", 1, 3, r"rank 1 \(pid \d+, .+\): parameters differ"),
                ("memory", 1, 2, r"rank 1 \(pid \d+, .+\): its memory is not enough \(CUDA out of memory\."),
                ("bug", 1, 2, r"rank 1 \(pid \d+, .+\): TypeError: two and two are five"),
                ("exit", 1, 2, r"rank 1 \(pid \d+, .+\) died without a word"),
            ]
        ),
    ],
)
def test_a_failing_rank_is_named_on_all(
    plan: Callable[[int], str], fault: str, rank: int, size: int, line: str
) -> None:
    done = faulty(plan(1), fault, rank, size=size)
    print(done.lines)
    assert done.code != 0
    (said,) = done.lines
    assert re.match(f"evoplan: {line}", said), said
    (at,) = re.findall(r"fault at ([\d.]+)", done.out)
    assert done.ended - float(at) < TIMEOUT + LEAVE
    ours = done.err.partition("torch/distributed/elastic")[0]  # torchrun reports its children's ends itself
    assert ("Traceback" in ours) == (fault == "bug")
    assert "step 1:" in done.out
    assert "step 3:" not in done.out


@pytest.mark.slow
def test_ranks_end_with_their_launcher(plan: Callable[[int], str]) -> None:
    flags = ["-m", "evoplan.planner", "run", plan(1), "--replicas", "2", "--steps", "100000"]
    with started(torchrun_command(2, *flags)) as launcher:
        while "step 1:" not in (line := launcher.stdout.readline()):
            assert line, "it ended"
        tasks = Path(f"/proc/{launcher.pid}/task")
        ranks = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
        assert len(ranks) == 2
        launcher.kill()
        end = time.monotonic() + LEAVE
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_wrong_world_is_refused(plan: Callable[[int], str]) -> None:
    done = torchrun(2, "-m", "evoplan.planner", "run", plan(2), "--replicas", "2")
    assert done.code != 0
    (line,) = done.lines
    assert "2 ranks in each of 2 replicas, 4 in all; torchrun started 2 processes" in line
    assert f"`torchrun --nproc_per_node=4 -m evoplan.planner run {plan(2)} --replicas 2`" in line
    assert "exitcode  : 2" in done.err


def test_another_plan_on_one_rank_is_refused(plan: Callable[[int], str], tmp_path: Path) -> None:
    script = tmp_path / "each_its_own.py"
    script.write_text(
        "import os\n"
        "from evoplan.planner.commands.cli import main\n"
        f"main(['run', {[plan(1), plan(2)]}[int(os.environ['RANK'])], '--replicas', '2'])\n"
    )
    done = launched(2, str(script))
    assert done.code != 0
    (line,) = done.lines
    assert re.match(
        r"evoplan: ranks differ in plan: rank 1 \(pid \d+, .+\) has \w{12}, the others \w{12}", line
    )


def test_one_process_is_told_to_use_torchrun(
    plan: Callable[[int], str], capsys: pytest.CaptureFixture
) -> None:
    from evoplan.planner.commands.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["run", plan(2)])
    assert stop.value.code == 2
    assert "use `torchrun --nproc_per_node=2 -m evoplan.planner run" in capsys.readouterr().err


def go(size: int, *arguments: str) -> Done:
    return launched(size, *arguments) if size > 1 else alone(*arguments)


def train(size: int, path: Path, *arguments: str) -> tuple[list[float], str]:
    """Losses, and what was printed."""
    done = go(size, "-m", "evoplan.planner", *arguments, "--json", str(path))
    assert done.code == 0, done.err
    return json.loads(path.read_text())["losses"], done.out


@pytest.fixture(scope="module")
def uninterrupted(
    plan: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[float]]:
    path = tmp_path_factory.mktemp("uninterrupted") / "run.json"
    return cache(lambda size: train(size, path, "run", plan(size), "--steps", "6")[0])


@pytest.mark.parametrize(
    ("fault", "size", "resumed_size", "kept"),
    [
        ("killed-saving", 1, 1, 2),
        pytest.param("killed", 1, 1, 4, marks=pytest.mark.slow),
        pytest.param("killed", 2, 2, 4, marks=pytest.mark.slow),
        pytest.param("killed", 2, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_interrupted_training_resumes(
    plan: Callable[[int], str],
    uninterrupted: Callable[..., list[float]],
    tmp_path: Path,
    fault: str,
    size: int,
    resumed_size: int,
    kept: int,
) -> None:
    """Killed in step 5, or while the snapshot of step 4 is written; the same bits on as many ranks."""
    folder = tmp_path / "snapshots"
    flags = ["--steps", "6", "--timeout", "20", "--snapshots", str(folder), "--save-every", "2"]
    broken = go(size, FAULTY, fault, "0", "5" if fault == "killed" else "2", "run", plan(size), *flags)
    assert broken.code != 0
    assert f"step-{kept:08d}" in {entry.name for entry in folder.iterdir()}
    path = tmp_path / "run.json"
    losses, out = train(resumed_size, path, "run", plan(resumed_size), *flags, "--resume")
    assert f"resumed after step {kept}" in out
    expected = uninterrupted(size)[kept:]
    assert losses == (expected if size == resumed_size else pytest.approx(expected, rel=1e-9))
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_snapshots_of_another_training_are_refused(plan: Callable[[int], str], tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    made, console = load_plan(plan(1)), Console(quiet=True)
    settings = Settings(steps=2, snapshots=str(folder), save_every=1)
    run_plan(made, settings, console)
    for changes, message in (
        ({}, "holds a snapshot of step 2; add --resume or name another folder"),
        ({"resume": True}, "is of step 2; to go on give more --steps"),
        ({"resume": True, "steps": 4, "seed": 1}, "is of another seed"),
    ):
        with pytest.raises(ValueError, match=message):
            run_plan(made, replace(settings, **changes), console)
    problem = made.problem.model_copy(update={"optimizer": "sgd"})
    with pytest.raises(ValueError, match="is of another optimizer"):
        run_plan(
            made.model_copy(update={"problem": problem}), replace(settings, resume=True, steps=4), console
        )


def test_resuming_without_a_snapshot_starts_anew(plan: Callable[[int], str], tmp_path: Path) -> None:
    settings = Settings(steps=2, snapshots=str(tmp_path / "none yet"), resume=True)
    made, console = load_plan(plan(1)), Console(quiet=True)
    expected = run_plan(made, Settings(steps=2), console)["losses"]
    assert run_plan(made, settings, console)["losses"] == expected


MEMBERS = {rank: Member(rank, 100 + rank, "host") for rank in range(3)}


@pytest.mark.parametrize(
    ("failures", "answered", "dead", "final", "expected"),
    [
        ({}, {0, 1}, (), False, None),
        ({}, {0, 1}, (), True, "rank 2 (pid 102, host) does not answer: it died or hangs"),
        ({}, {0, 1}, {2}, False, "rank 2 (pid 102, host) died without a word: killed, or out of memory"),
        ({}, {0, 1, 2}, (), False, "ended by SIGTERM"),
        # Whoever fails by itself is to blame, not those whose collective then fails.
        ({0: (1, "collective", "reset"), 2: (2, "own", "no")}, {0}, {1}, False, "rank 2 (pid 102, host): no"),
        ({0: (2, "own", "late"), 1: (1, "own", "soon")}, {0, 1}, (), False, "rank 1 (pid 101, host): soon"),
        ({1: (1, "common", "all alike")}, {0, 1}, (), False, "all alike"),
        ({0: (1, "collective", "late")}, {0, 1, 2}, (), False, None),
        (
            {0: (1, "collective", "late"), 1: (2, "collective", "late")}, {0, 1, 2}, (), True,
            "rank 2 (pid 102, host) does not take part: the others waited in vain",
        ),
        (
            {rank: (rank + 1, "collective", f"text {rank}") for rank in range(3)}, {0, 1, 2}, (), False,
            "rank 0 (pid 100, host): text 0",
        ),
    ],
)  # fmt: skip
def test_verdicts(failures: dict, answered: set, dead: set, final: bool, expected: str | None) -> None:
    told = {rank: Failure(*failure, code=1) for rank, failure in failures.items()}
    found = verdict(MEMBERS, told, answered, dead, final, "ended by SIGTERM")
    assert (found and found[0]) == expected


def test_the_odd_ones_are_few() -> None:
    assert odd_ones({0: "a", 1: "a"}) == []
    assert odd_ones({0: "a", 1: "b"}) == [1]
    assert odd_ones({0: "a", 1: "b", 2: "b"}) == [0]
