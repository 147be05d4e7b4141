"""Where and at which sizes the parts run, and the problems that follow from that."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from evoplan.cost_model.machine import local_name
from evoplan.model.config import InputShape
from evoplan.model.families import EvoformerConfig
from evoplan.planner.checking.trial import available_bytes
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.planning import NoPlanError, solve
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Mixed, Mode, Problem

Row = dict[str, Any]
Runs = dict[str, Callable[[], Row]]  # by name: each may run alone, after any of the others
Size = tuple[int, int, int]  # s, r, blocks

PRECISIONS = ("fp32", "bf16-mixed")
ROOM = 0.85  # of the free memory: what is measured may take more than was predicted


@dataclass(frozen=True)
class Sizes:
    """What is run; a file with other sizes is not taken up again.

    Attributes:
        channels: c_m and c_z.
        training, inference: of the plans whose memory is measured.
        shares: where their budgets lie between the least and the plain model's peak, on a logarithmic scale.
        inference_shares: the same in inference.
        capped: of the plans that live under a hard cap, at those shares.
        against: of plans that are timed against schedules by hand.
        profiled: of the steps that are profiled one by one.
        offloaded: of the plan with state in host memory.
        rounds: timed runs of each.
        repeats: timed runs of each strategy of each step.
        pieces: most that a step is cut into where every strategy of it is timed.
    """

    channels: tuple[int, int]
    training: tuple[Size, ...]
    inference: tuple[Size, ...]
    shares: tuple[float, ...]
    inference_shares: tuple[float, ...]
    capped: Size
    capped_shares: tuple[float, ...]
    against: tuple[Size, ...]
    profiled: Size
    offloaded: Size
    rounds: int
    repeats: int
    pieces: int


# Ten plans of each precision: two sizes in training at four budgets, one in inference at two.
FULL = Sizes(
    channels=(256, 128),
    training=((128, 256, 4), (124, 187, 8)),
    inference=((128, 512, 4),),
    shares=(0.0, 0.3, 0.6, 1.0),
    inference_shares=(0.0, 0.5),
    capped=(128, 256, 4),
    capped_shares=(0.0, 0.3, 0.6),
    against=((128, 256, 4), (128, 384, 4)),
    profiled=(128, 256, 1),
    offloaded=(128, 1024, 2),
    rounds=7,
    repeats=3,
    pieces=8,
)
SMALL = Sizes(
    channels=(16, 24),
    training=((5, 7, 2),),
    inference=((5, 11, 2),),
    shares=(0.0, 0.6),
    inference_shares=(0.0,),
    capped=(5, 7, 2),
    capped_shares=(0.0,),
    against=((5, 7, 1),),
    profiled=(5, 7, 1),
    offloaded=(3, 13, 1),
    rounds=2,
    repeats=1,
    pieces=2,
)


@dataclass(frozen=True)
class Setting:
    """Where the parts run.

    Attributes:
        device: cpu or cuda.
        small: at sizes that take seconds on a processor.
        cache: of measured times; the user's own if not given.
    """

    device: str
    small: bool
    cache: str | None = None

    @property
    def sizes(self) -> Sizes:
        """What is run."""
        return SMALL if self.small else FULL

    def told(self) -> Row:
        """What results depend on, as their files have it."""
        sizes = {name: _listed(value) for name, value in asdict(self.sizes).items()}
        return {"device": local_name(self.device), "torch": torch.__version__, "sizes": sizes}

    def problem(self, size: Size, precision: str, mode: Mode = "training") -> Problem:
        """AlphaFold 2's main stack without dropout and without an optimizer."""
        s, r, blocks = size
        c_m, c_z = self.sizes.channels
        mixed: Mixed | None = "bf16-mixed" if precision == "bf16-mixed" else None
        return Problem(
            model="alphafold2", config=EvoformerConfig(n_block=blocks, c_m=c_m, c_z=c_z).with_dropout(0.0),
            shape=InputShape(s, r), device=self.device, optimizer="none", mixed=mixed, mode=mode,
        )  # fmt: skip


def _listed(value: Any) -> Any:
    """As JSON gives it back."""
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


@cache
def costed(problem: Problem) -> Costed:
    """Traced once for all plans of a part."""
    return cost_problem(problem)


def plan_at(problem: Problem, share: float) -> Plan:
    """The plan at a share of the way from the least budget to the plain model's peak, or to what is free."""
    costs = costed(problem)
    least = least_bytes(costs)
    plain = plan_within(costs, None).baselines["none"].peak_bytes
    free_up()
    room = int(ROOM * available_bytes(problem.device))
    if room < least:
        raise MemoryError(f"the least plan takes {least:,} bytes, {room:,} are free")
    return plan_within(costs, min(round(least * (max(plain, least) / least) ** share), room))


def plan_within(costs: Costed, budget: int | None) -> Plan:
    """The plan for so many bytes."""
    return solve(replace(costs, problem=costs.problem.model_copy(update={"budget_bytes": budget})))


def least_bytes(costs: Costed) -> int:
    """The least budget that has a plan."""
    try:
        return plan_within(costs, 1).predicted.peak_bytes
    except NoPlanError as error:
        return error.least_feasible_bytes


def free_up() -> None:
    """Let go of what nobody holds, so that a run begins as in a process of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def named(size: Size) -> str:
    """A size in the name of a run."""
    s, r, blocks = size
    return f"s={s} r={r} {blocks} block{'s' * (blocks != 1)}"
