"""Named instances: the files, and the runner that scores solvers on them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from evoplan.cost_model.costs import CostTable
from evoplan.experiments.instances.__main__ import instances
from evoplan.experiments.instances.catalogue import FOLDER, INSTANCES, read
from evoplan.experiments.instances.rotor import Rotor, rotor, stages_of
from evoplan.experiments.instances.scoring import RefusedError, found_solver, score
from evoplan.experiments.instances.tables import table_from_json, table_to_json
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.solvers import SOLVERS, dynamic_program
from evoplan.planner.solvers.baselines import every_block, keep_everything

SMALL = "narrow-4"


@pytest.mark.parametrize("name", INSTANCES)
def test_what_is_best_is_no_faster_than_what_is_proven(name: str) -> None:
    table, best = read(name)
    assert len(table.groups) >= 4
    assert len(best) >= 6
    assert [each.budget_bytes for each in best] == sorted({each.budget_bytes for each in best})
    for before, after in pairwise(best):
        assert after.seconds <= before.seconds
    assert all(0 < each.bound_seconds <= each.seconds for each in best)


def test_the_files_are_what_the_replay_says() -> None:
    table, best = read(SMALL)
    for known in best:
        played = replay(dynamic_program(table, known.budget_bytes), table)
        assert played.peak_bytes <= known.budget_bytes
        assert played.seconds == pytest.approx(known.seconds, rel=1e-9)


def test_a_table_comes_back_as_it_went() -> None:
    table, _ = read(SMALL)
    again = table_from_json(json.loads(json.dumps(table_to_json(table))))
    assert again == table
    assert len({id(options) for options in again.options}) == len({id(o) for o in table.options})
    schedule = every_block(table)
    assert replay(schedule, again).peak_bytes == replay(schedule, table).peak_bytes


def test_equal_blocks_are_stored_once() -> None:
    table, _ = read("evoformer-1000")
    assert len(table.groups) == 1000
    assert (FOLDER / "evoformer-1000.json").stat().st_size < 200_000


def test_a_schedule_over_the_budget_is_refused() -> None:
    with pytest.raises(RefusedError, match="the budget is"):
        list(score(lambda table, budget: keep_everything(table), SMALL))


def test_what_is_no_schedule_of_the_table_is_refused() -> None:
    def half(table: CostTable, budget: int | None) -> Sequence:
        return Sequence(every_block(table).parts[:2])

    with pytest.raises(RefusedError, match="no schedule"):
        list(score(half, SMALL))


def test_evoplan_scores_one() -> None:
    scores = list(score(found_solver("dp"), SMALL))
    assert [each.over_best for each in scores] == pytest.approx([1.0] * len(scores))


def test_a_solver_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("from evoplan.planner.solvers import SOLVERS\nfind = SOLVERS['seed-dp']\n")
    theirs = [each.step_seconds for each in score(found_solver(f"{path}:find"), SMALL)]
    ours = [each.step_seconds for each in score(SOLVERS["seed-dp"], SMALL)]
    assert theirs == ours
    for wrong in (f"{path}:other", f"{tmp_path}/none.py:find", "nobody"):
        with pytest.raises(ValueError, match=r"has no function|no Python file|unknown solver"):
            found_solver(wrong)


def test_rotor_fits_and_is_no_faster_than_what_is_proven() -> None:
    table, best = read(SMALL)
    found = 0
    for known in best:
        if known.budget_bytes < 64 << 20:
            continue
        played = replay(rotor(table, known.budget_bytes), table)
        assert played.peak_bytes <= known.budget_bytes
        assert played.seconds >= known.bound_seconds * (1 - 1e-9)
        found += 1
    assert found >= 4


def test_rotor_is_the_best_of_all_ways_to_save_or_recompute() -> None:
    """Against every choice for a chain of four stages, in the program's own account of memory."""
    table, _ = read(SMALL)
    stages = stages_of(table)[:4]

    def best(start: int, length: int, memory: int) -> float:
        if not length:
            return 0.0
        stage, found = stages[start], float("inf")
        extra = max(stage.forward_extra, stage.backward_extra)
        if -(-extra // unit) <= memory:
            rest = memory - (-(-stage.kept_bytes // unit) if length > 1 else 0)
            if rest >= 0:
                own = stage.forward_seconds + stage.backward_seconds
                found = own + best(start + 1, length - 1, rest)
        for count in range(1, length):
            passed = stages[start : start + count]
            held = memory - -(-stages[start + count].input_bytes // unit)
            if held >= 0 and -(-max(each.discard_extra for each in passed) // unit) <= memory:
                seconds = sum(each.discard_seconds for each in passed)
                later = best(start + count, length - count, held) + best(start, count, memory)
                found = min(found, seconds + later)
        return found

    seen = set()
    for memory in range(20 << 20, 200 << 20, 12 << 20):
        program = Rotor(stages, memory)
        unit = program.unit
        least = float(program.times[program._key(0, 4)][-1])
        assert least == pytest.approx(best(0, 4, program.size - 1))
        seen.add(least)
    assert len(seen) > 3


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["score", "nobody"], 2), (["score", "none", "--only", SMALL], 1)):
        with pytest.raises(SystemExit) as ended:
            run_command(instances, "instances", arguments)
        assert ended.value.code == code
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
