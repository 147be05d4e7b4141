"""What training keeps in host memory: schedules, what they cost to the byte, plans and commands."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import UntypedStorage

from evoplan.cost_model.casting import casting_of
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.fakes import fake_copy
from evoplan.cost_model.simulation import simulated
from evoplan.model import EvoformerStack
from evoplan.model.running.kinds import WHOLE
from evoplan.planner import simulate_plan
from evoplan.planner.checking.trial import Trial
from evoplan.planner.checking.trial import random_inputs as inputs_of
from evoplan.planner.commands.cli import cli
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.host import FakeHost
from evoplan.planner.plans.certify import certify
from evoplan.planner.plans.plan import load_plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.plans.sealed import PlanFileError
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Mixed, Problem
from evoplan.planner.schedules.holdings import holdings
from evoplan.planner.schedules.offload import waiting_bytes
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import RECORD, Checkpoint, Run, Sequence
from evoplan.planner.schedules.text import schedule_from_json, schedule_to_json
from evoplan.planner.solvers.offload_frontier import OffloadFrontier
from tests.conftest import random_schedule_of
from tests.offload import CONFIG, SHAPE, asked, random_of, with_waits

# --- the schedule -------------------------------------------------------------------------------


@pytest.fixture
def table(stack_table: CostTable) -> CostTable:
    """Costs of a stack's steps, on a device with a host."""
    return replace(stack_table, host_bandwidth=1e9)


def test_schedules_as_json(stack: EvoformerStack, table: CostTable) -> None:
    for seed in range(5):
        schedule = with_waits(random_schedule_of(stack, seed), table.liveness, random.Random(seed))
        document = json.loads(json.dumps(schedule_to_json(schedule)))
        assert schedule_from_json(document) == schedule


@pytest.mark.parametrize(
    "part",
    [
        {"wait": [], "part": [0, "whole"]},
        {"wait": ["m"], "part": {"wait": ["m"], "part": [0, "whole"]}},
        {"wait": "m", "part": [0, "whole"]},
        {"wait": [1], "part": [0, "whole"]},
        {"wait": ["m"]},
    ],
)
def test_malformed_waits_are_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="is no part of a schedule"):
        schedule_from_json([part])


def test_what_cannot_wait_is_refused(stack: EvoformerStack, table: CostTable) -> None:
    whole = [Run(step, WHOLE) for step in range(18)]

    def waiting(step: int, *names: str) -> Sequence:
        return Sequence((*whole[:step], replace(whole[step], wait=names), *whole[step + 1 :]))

    replay(waiting(1, "m", RECORD), table)
    for schedule, message in (
        (waiting(0, "m"), "after step 0 m cannot wait in host memory: what can is record"),  # the caller's
        (waiting(1, "z"), "after step 1 z cannot wait"),
        (waiting(1, "x"), "after step 1 x cannot wait"),
        (waiting(1, "m", "m"), "something is to wait twice"),
        (waiting(17, RECORD), "after step 17, the last, nothing runs"),
    ):
        with pytest.raises(ValueError, match=message):
            replay(schedule, table)
        with pytest.raises(ValueError, match=message):
            PlannedModule(stack, schedule)
    with pytest.raises(ValueError, match="on a device apart from the host"):
        replay(waiting(1, "m"), replace(table, host_bandwidth=None))
    with pytest.raises(ValueError, match="what a redo keeps does not wait"):
        Checkpoint(waiting(1, "m"), (whole[0].strategy,) * 18)


# --- the replay and the account ------------------------------------------------------------------


def test_a_copy_lasts_no_less_than_its_bytes_take(table: CostTable) -> None:
    whole = [Run(step, WHOLE) for step in range(18)]
    plain = replay(Sequence(tuple(whole)), table)
    schedule = Sequence((whole[0], replace(whole[1], wait=("m", RECORD)), *whole[2:]))
    size = sum(waiting_bytes(schedule, table))
    (cost,), (beside,) = ([c for c in table.options[n] if c.strategy == WHOLE] for n in (1, 2))
    assert size == table.state_bytes["m"] + cost.preserved_bytes
    played = replay(schedule, replace(table, host_bandwidth=size / 1000))  # a thousand seconds each way
    hidden = beside.forward_seconds + beside.backward_seconds
    assert played.seconds == pytest.approx(plain.seconds + 2000 - hidden)
    assert played.host_bytes == size
    quick = replay(schedule, replace(table, host_bandwidth=1e15))
    assert quick.seconds == pytest.approx(plain.seconds)
    # While it is away it does not count: at the loss, and wherever the peak may be.
    loss = next(n for n, moment in enumerate(quick.moments) if moment.phase == "loss")
    before = next(moment for moment in plain.moments if moment.phase == "loss")
    assert quick.moments[loss].held_bytes == before.held_bytes - size


@pytest.mark.parametrize("seed", range(10))
def test_every_byte_has_an_owner(stack: EvoformerStack, table: CostTable, seed: int) -> None:
    rng = random.Random(seed)
    schedule = with_waits(random_of(table, stack, rng), table.liveness, rng)
    found = holdings(schedule, table)
    assert [sum(parts.values()) for parts in found.parts] == [m.peak_bytes for m in found.replay.moments]
    assert min(min(parts.values()) for parts in found.parts) >= 0


def peak_of(schedule: Sequence, costed: Costed) -> int:
    """Of the applied schedule on tensors without data."""
    problem, static = costed.problem, costed.static
    with simulated(costed.device) as trace:
        model = fake_copy(EvoformerStack(problem.config)).train()
        before = trace.live_bytes
        planned = PlannedModule(model, schedule, host=partial(FakeHost, trace))
        shapes = problem.state_shapes() | problem.mask_shapes()
        trial = Trial(planned, problem, inputs_of(problem, shapes))
        trial.casting = casting_of(costed.device.kind, problem.autocast)
        trace.reset()
        trial.run()
        peak = trace.peak_bytes - before
    return peak + sum(static[name] for name in ("parameters", "optimizer", "workspace"))


@pytest.mark.parametrize(("device", "mixed"), [("a100-40gb", "bf16-mixed"), ("cpu", None)])
def test_the_applied_schedule_takes_what_the_replay_says(device: str, mixed: Mixed | None) -> None:
    costed = cost_problem(Problem(model="custom", config=CONFIG, shape=SHAPE, device=device, mixed=mixed))
    table, stack = replace(costed.table, host_bandwidth=1e9), EvoformerStack(CONFIG)
    waited = 0
    for seed in range(4):
        rng = random.Random(seed)
        bare = random_of(table, stack, rng)
        schedule = with_waits(bare, table.liveness, rng)
        waited += sum(waiting_bytes(schedule, table)) > 0
        spare = [
            replay(one, table).peak_bytes + costed.fixed_bytes - peak_of(one, costed)
            for one in (bare, schedule)
        ]
        # What a prediction leaves open without waiting (numbers of the loss, casts that go early).
        assert 0 <= spare[1] <= spare[0] + 64
    assert waited > 2


# --- plans and commands --------------------------------------------------------------------------


def test_a_sweep_with_host_memory(tmp_path: Path) -> None:
    small = ["--n-blocks", "2", "--n-seq", "12", "--n-res", "16", "--device", "a100-40gb", "--points", "3"]
    path = tmp_path / "sweep.json"
    run_command(cli, "evoplan", ["sweep", *small, "--host-memory", "1GiB", "--json", str(path)])
    points = json.loads(path.read_text())["points"]
    assert len(points) == 3
    assert all(point["peak_bytes"] <= point["budget_bytes"] for point in points)


def test_a_plan_with_host_memory(tmp_path: Path) -> None:
    costed = cost_problem(asked(config=replace(CONFIG, n_block=4)))
    least = OffloadFrontier(costed.table, 2**30).least_replay.peak_bytes + costed.fixed_bytes
    problem = costed.problem.model_copy(update={"budget_bytes": least})
    costed = replace(costed, problem=problem)
    plan = solve(costed)
    assert 0 < plan.predicted.host_bytes <= 2**30
    assert plan.predicted.peak_bytes <= least
    verified = simulate_plan(plan)
    assert verified.ok
    assert 0.999 * least <= verified.measured_peak_bytes <= plan.predicted.peak_bytes
    certificate = certify(costed, plan).solver.certificates[0]
    assert certificate.waits
    assert certificate.gap is not None
    assert certificate.gap < 0.02
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    for update in ({"host_bytes": None}, {"host_bytes": 1}):
        other = plan.model_copy(update={"problem": plan.problem.model_copy(update=update)})
        other.save(tmp_path / "other.json")
        with pytest.raises(PlanFileError, match="more is to wait in host memory than the problem has"):
            load_plan(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cp-sat lets nothing wait"):
        solve(costed, "cp-sat")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host-memory", "1GiB"], "cpu has no memory apart from the host's"),
        (["--host-memory", "1GiB", "--device", "a100-40gb", "--mode", "inference"], "planned for training"),
        (["--host-memory", "nothing", "--device", "a100-40gb"], "nothing"),
    ],
)
def test_where_there_is_no_such_memory(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["plan", "--n-blocks", "1", "--n-seq", "4", "--n-res", "6"]
    with pytest.raises(SystemExit) as stopped:
        run_command(cli, "evoplan", [*small, *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_storages_that_are_forgotten_are_not_counted_twice() -> None:
    with simulated() as trace:
        here: UntypedStorage = torch.empty(100, dtype=torch.uint8).untyped_storage()
        assert trace.live_bytes == 100
        trace.left(here)
        assert trace.live_bytes == 0
        trace.returned(here)
        trace.left(here)
        del here
        assert trace.live_bytes == 0
