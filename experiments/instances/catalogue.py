"""The instances: which problems they are, and the files they are kept in."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evoplan.cost_model.costs import CostTable
from evoplan.experiments.instances.tables import table_from_json, table_to_json
from evoplan.experiments.planning import stacked
from evoplan.model.config import override
from evoplan.model.families import preset
from evoplan.planner.files import write_text
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Mode, Problem
from evoplan.planner.schedules.replay import replay
from evoplan.planner.solvers import Frontier, InfeasibleError, dynamic_program
from evoplan.planner.solvers.bounds import LowerBound

FOLDER = Path(__file__).parent
BUDGETS = 8
DEVICE = "a100-40gb"  # whose roofline the times are


@dataclass(frozen=True)
class Instance:
    """A problem with a name.

    Attributes:
        model: a preset.
        blocks: so many of its last stack's; None: as many as it has.
        shape: what differs from the preset's.
        bound_units: steps of the grid of its proven bound.
    """

    name: str
    model: str
    dtype: str
    blocks: int | None = None
    shape: tuple[tuple[str, int], ...] = ()
    mode: Mode = "training"
    ranks: int = 1
    bound_units: int = 8192

    @property
    def about(self) -> str:
        """In a line."""
        shape = "".join(f", {name}={size}" for name, size in self.shape)
        blocks = "" if self.blocks is None else f", {self.blocks} blocks"
        ranks = "" if self.ranks == 1 else f", the first of {self.ranks} ranks"
        return f"{self.model}{blocks}{shape}, {self.dtype} {self.mode}{ranks}, {DEVICE}"

    def table(self) -> CostTable:
        """Its costs, traced; of deep stacks one block's, again and again."""
        chosen = preset(self.model)
        config = chosen.config
        deep = self.blocks is not None and self.blocks > 48
        if self.blocks is not None:
            config = config.with_blocks(2 if deep else self.blocks)
        problem = Problem(
            model=self.model, config=config, shape=override(chosen.shape, **dict(self.shape)),
            dtype=self.dtype, mode=self.mode, ranks=self.ranks, device=DEVICE,
        )  # fmt: skip
        table = cost_problem(problem).table
        if self.blocks is None or not deep:
            return table
        units = tuple(range(step, step + 1) for step in range(self.blocks * len(table.groups[0])))
        return replace(stacked(table, self.blocks), units=units)


LARGE = (("n_seq", 512), ("n_res", 384))
INSTANCES = {
    instance.name: instance
    for instance in (
        Instance("narrow-4", "alphafold2-narrow", "float32", 4),
        Instance("tiny-openfold", "tiny-openfold", "float32"),
        Instance("msa-module-4", "msa-module-4", "bfloat16"),
        Instance("extra-4", "alphafold2-extra-finetune", "float16"),
        Instance("evoformer-8", "alphafold2", "float16", 8),
        Instance("evoformer-48", "alphafold2-finetune", "float16", 48, LARGE),
        Instance("evoformer-48-ranks-2", "alphafold2-finetune", "float16", 48, LARGE, ranks=2),
        Instance("trunk", "alphafold2-trunk-finetune", "float16", bound_units=4096),
        Instance("pairformer-48", "pairformer-48", "bfloat16"),
        Instance("evoformer-200", "alphafold2-finetune", "float16", 200, LARGE, bound_units=4096),
        Instance("evoformer-1000", "alphafold2-finetune", "float16", 1000, LARGE, bound_units=2048),
        Instance("t1044-inference", "alphafold2-t1044", "float32", mode="inference"),
    )
}


@dataclass(frozen=True)
class Best:
    """The best that is known for a budget, and what is proven that nothing beats.

    Attributes:
        bound_seconds: no persistent schedule is faster, whatever its nesting.
    """

    budget_bytes: int
    seconds: float
    bound_seconds: float


def make(instance: Instance) -> dict[str, Any]:
    """An instance's file: its table, and evoplan's frontier and bound at some budgets."""
    table = table_from_json(table_to_json(instance.table()))
    rows = [
        {"budget_bytes": best.budget_bytes, "seconds": best.seconds, "bound_seconds": best.bound_seconds}
        for best in (_trained(table, instance.bound_units) if table.training else _inferred(table))
    ]
    return {"name": instance.name, "about": instance.about, "best": rows, "table": table_to_json(table)}


def _trained(table: CostTable, units: int) -> list[Best]:
    frontier = Frontier(table)
    bound = LowerBound(table, spans=frontier.spans, units=units)
    found = []
    for budget in frontier.budgets(BUDGETS):
        played = replay(frontier.schedule(budget), table)
        # Bounds charge memory as the program does; what the replay finds cheaper may come before them.
        found.append(Best(budget, played.seconds, min(bound.seconds(budget), played.seconds)))
    return found


def _inferred(table: CostTable) -> list[Best]:
    most = replay(dynamic_program(table, None), table)
    try:
        dynamic_program(table, 1)
        least = 1
    except InfeasibleError as error:
        least = error.least_bytes
    step = (most.peak_bytes / least) ** (1 / (BUDGETS - 1))
    budgets = sorted({least, most.peak_bytes, *(int(least * step**power) for power in range(1, BUDGETS - 1))})
    played = [(budget, replay(dynamic_program(table, budget), table).seconds) for budget in budgets]
    return [Best(budget, seconds, seconds) for budget, seconds in played]  # a shortest path: proven


def write(found: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write an instance's file: a line for each step's strategy and each budget."""
    path = folder / f"{found['name']}.json"
    write_text(path, json.dumps(found, separators=(",", ":")).replace("],[", "],\n[") + "\n")
    return path


def read(name: str, folder: Path = FOLDER) -> tuple[CostTable, list[Best]]:
    """An instance's table, and the best that is known.

    Raises:
        ValueError: there is no such file, or something else is in it.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        there = sorted(each.stem for each in folder.glob("*.json"))
        raise ValueError(f"unknown instance {name!r}; choose of: {', '.join(there)}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return table_from_json(found["table"]), [Best(**row) for row in found["best"]]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no instance ({error}); make it anew") from None
