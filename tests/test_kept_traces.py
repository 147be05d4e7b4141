"""What is kept of traces is what tracing finds, under a key of all that it depends on."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evoplan.cost_model import kept, tracing
from evoplan.cost_model.costs import CostTable, build_cost_table
from evoplan.cost_model.devices import device
from evoplan.cost_model.steps import StepCost, offered_strategies, trace_step
from evoplan.model.config import InputShape
from evoplan.model.modules.evoformer import EvoformerStack
from evoplan.model.running.chain import Step
from evoplan.model.running.strategy import Strategy
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from tests.conftest import TINY

ONE = replace(TINY, n_block=1)
SHAPE = InputShape(5, 7)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVOPLAN_TRACES", str(tmp_path))
    return tmp_path


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that are traced from here on, not read."""
    names: list[str] = []

    def noted(step: Any, *about: Any) -> StepCost:
        names.append(step.name)
        return trace_step(step, *about)

    monkeypatch.setattr(tracing, "trace_step", noted)
    return names


def few(step: Step, shape: Sequence[int]) -> list[Strategy]:
    """Enough to see what is traced and what is read: a step whole, and in two chunks."""
    return [strategy for strategy in offered_strategies(step, shape) if strategy.kind != "lean"][:2]


def table(config: Any = ONE, shape: InputShape = SHAPE, stack: Any = None, **about: Any) -> CostTable:
    if stack is None:
        with torch.device("meta"):
            stack = EvoformerStack(config).train()
    about = {"dtype": "float32", "device": device("cpu"), "strategies": few, **about}
    return build_cost_table(stack, config.state_shapes(shape), **about)


def test_what_is_read_is_what_was_traced(traced: list[str], folder: Path, monkeypatch) -> None:
    first = table(strategies=None)
    assert len(set(traced)) == 9
    traced.clear()
    assert table(strategies=None) == first
    assert not traced
    monkeypatch.setenv("EVOPLAN_TRACES", "")
    assert table(strategies=None) == first
    assert len(set(traced)) == 9
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"config": replace(ONE, c_m=15)},
        {"config": replace(ONE, c_head=3)},
        {"config": ONE.with_dropout(0.0)},
        {"shape": InputShape(5, 8)},
        {"shape": InputShape(5, 7, batch=2)},
        {"dtype": "bfloat16"},
        {"device": device("a100-40gb")},
        {"training": False},
        {"autocast": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_costs_depend_on_is_traced_anew(traced: list[str], changes: dict[str, Any]) -> None:
    table()
    traced.clear()
    found = table(**changes)
    assert traced
    traced.clear()
    assert table(**changes) == found
    assert not traced


def test_threads_and_frozen_parts_are_told_apart(traced: list[str]) -> None:
    threads = torch.get_num_threads()
    table()
    traced.clear()
    torch.set_num_threads(threads + 1)
    try:
        table()
    finally:
        torch.set_num_threads(threads)
    assert len(set(traced)) == 9
    traced.clear()
    stack = EvoformerStack(ONE).train()
    stack.blocks[0].row_attention.requires_grad_(False)
    table(stack=stack)
    assert set(traced) == {"blocks.0.row_attention"}


def test_processors_of_one_name_are_told_apart(traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines call many by one name, which does not say what kernels run, with how much scratch."""
    table()
    traced.clear()
    table()
    assert not traced
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    table()
    assert traced


HALF = """
from evoplan.model import EvoformerConfig, InputShape
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
asked = Problem(model="custom", config=EvoformerConfig(1, 32, 32), shape=InputShape(12, 20), dtype="bfloat16")
print(sum(cost.forward_bytes for costs in cost_problem(asked).table.options for cost in costs))
"""


def test_kernels_that_the_environment_forbids_take_no_scratch_later(folder: Path) -> None:
    """oneDNN without AVX-512 runs no half precision and packs nothing; what was traced then is not read."""

    def total(**environment: str) -> int:
        ran = subprocess.run(
            [sys.executable, "-c", HALF], env=os.environ | environment, capture_output=True, check=True
        )
        return int(ran.stdout)

    total(ONEDNN_MAX_CPU_ISA="AVX2")
    assert total() == total(EVOPLAN_TRACES="")


def test_each_ranks_share_has_its_own(traced: list[str]) -> None:
    def cost(rank: int, ranks: int) -> CostTable:
        problem = Problem(model="custom", config=ONE, shape=InputShape(5, 6), ranks=ranks)
        return cost_problem(problem, rank=rank).table

    found = [cost(0, 2), cost(1, 2), cost(1, 3)]
    assert traced
    traced.clear()
    assert [cost(0, 2), cost(1, 2), cost(1, 3)] == found
    assert not traced


def test_what_somebody_else_wrote_is_not_kept(traced: list[str], folder: Path) -> None:
    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    stack = EvoformerStack(ONE).train()
    transition = stack.blocks[0].pair_transition
    transition.linear_1 = Halved(transition.linear_1.in_features, transition.linear_1.out_features)
    table(stack=stack, strategies=None)
    traced.clear()
    options = table(stack=stack, strategies=None).options[-1]
    assert set(traced) == {"blocks.0.pair_transition"}
    # No slice of a weight may be taken of it either.
    assert {option.strategy.kind for option in options} == {"whole", "lean", "chunk"}


@pytest.mark.parametrize("damage", ["bytes", "table", "text", "numbers"])
def test_damage_is_traced_over(traced: list[str], folder: Path, damage: str) -> None:
    first = table()
    (path,) = folder.iterdir()
    if damage == "bytes":
        path.write_bytes(b"no database" * 100)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute(
                {
                    "table": "drop table costs",
                    "text": "update costs set cost = 'x'",
                    "numbers": "update costs set cost = '[[1, 2], [[], [], []]]'",
                }[damage]
            )
    traced.clear()
    assert table() == first
    assert len(set(traced)) == 9


def test_a_folder_that_cannot_be_made(traced: list[str], folder: Path, monkeypatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("EVOPLAN_TRACES", str(folder / "file" / "below"))
    first = table()
    traced.clear()
    assert table() == first
    assert traced


def test_other_sources_have_another_file(folder: Path, tmp_path: Path, monkeypatch) -> None:
    before = kept.default_path()
    source = tmp_path / "changed.py"
    source.write_text("1")
    sources = [*kept._sources(), source]
    monkeypatch.setattr(kept, "_sources", lambda: iter(sources))
    kept._digest_of_sources.cache_clear()
    try:
        assert kept.default_path() != before
    finally:
        kept._digest_of_sources.cache_clear()
