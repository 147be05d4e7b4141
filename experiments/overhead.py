"""What the executor costs: a plan that equals `large` beside the same thing written by hand.

    python -m evoplan.experiments.overhead [--rounds N]

By hand is `torch.utils.checkpoint` around each block. Both run interleaved in one process on the same
model and inputs. The figure is the median of the ratios of neighbouring runs; beside it stands the
ratio of the fastest runs, which noise can only slow down.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evoplan.cost_model import measure
from evoplan.model.families import EvoformerConfig
from evoplan.model.modules.evoformer import EvoformerStack
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.chain import Chain, Step
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.commands.flags import REPEATS
from evoplan.planner.commands.terminal import CHECK_FAILED, run_command
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.files import check_writable, write_json
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence

RESULTS = Path(__file__).parent / "results" / "overhead.json"
NARROW = EvoformerConfig(n_block=4, c_m=64, c_z=64)
CASES = [(NARROW, 16, 32), (NARROW, 32, 64), (replace(NARROW, c_m=256, c_z=128), 16, 48)]
LIMIT = 1.02


class ByHand(nn.Module):
    """The stack with a checkpoint around each block."""

    def __init__(self, stack: EvoformerStack) -> None:
        super().__init__()
        self.stack, self.chain = stack, Chain.of(stack)

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """As the stack's own."""
        _, constants = self.stack.prepare(m, z)
        for group in self.chain.groups:
            steps = self.chain.steps[group.start : group.stop]
            m, z = checkpoint(_run_block, steps, m, z, *constants.values(), use_reentrant=False,
                              preserve_rng_state=False)  # fmt: skip
        return m, z


def _run_block(steps: tuple[Step, ...], m: Tensor, z: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor]:
    constants = dict(zip(("msa_mask", "pair_mask", "pair_count"), masks, strict=True))
    state = {"m": m, "z": z}
    for step in steps:
        state[step.target] = step.submodule.new_target(step.tensors(state, constants, None))
    return state["m"], state["z"]


def large(stack: EvoformerStack) -> Sequence:
    """Every block under one checkpoint."""
    return Sequence(
        tuple(
            Checkpoint(Sequence(tuple(Run(step, WHOLE) for step in group)), (WHOLE,) * len(group))
            for group in Chain.of(stack).groups
        )
    )


def compare(config: EvoformerConfig, s: int, r: int, rounds: int) -> dict[str, Any]:
    """Ratios of neighbouring runs, planned over by hand; dropout is off."""
    torch.manual_seed(0)
    stack = EvoformerStack(config.with_dropout(0.0)).train()
    m, z = torch.randn(1, s, r, config.c_m), torch.randn(1, r, r, config.c_z)
    runs = {"planned": PlannedModule(stack, large(stack)), "by hand": ByHand(stack)}

    def step(module: nn.Module) -> None:
        stack.zero_grad(set_to_none=False)
        mean_square(*module(m, z)).backward()

    times: dict[str, list[float]] = {name: [] for name in runs}
    for module in runs.values():
        step(module)
    for index in range(rounds):
        for name in sorted(runs, reverse=bool(index % 2)):  # neither always runs second
            times[name].append(measure.seconds(partial(step, runs[name]), "cpu"))
    ratios = sorted(a / b for a, b in zip(times["planned"], times["by hand"], strict=True))
    quarter = len(ratios) // 4
    return {
        "blocks": config.n_block, "c_m": config.c_m, "s": s, "r": r, "rounds": rounds,
        "planned_seconds": statistics.median(times["planned"]),
        "by_hand_seconds": statistics.median(times["by hand"]),
        "ratio": statistics.median(ratios),
        "fastest_ratio": min(times["planned"]) / min(times["by hand"]),
        "quartiles": [ratios[quarter], ratios[-1 - quarter]],
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--rounds", type=REPEATS, default=25, show_default=True, help="Runs of each.")
def command(rounds: int) -> None:
    """Print the ratios, write them as JSON; exit code 1 if the fastest runs do not keep the limit."""
    check_writable(RESULTS)
    console = Console(width=110)
    rows = []
    for config, s, r in CASES:
        row = compare(config, s, r, rounds)
        rows.append(row)
        low, high = row["quartiles"]
        console.print(
            f"{row['blocks']} blocks, c_m={row['c_m']}, s={s}, r={r}: "
            f"planned {row['planned_seconds']:.3f} s, "
            f"by hand {row['by_hand_seconds']:.3f} s, ratio {row['ratio']:.3f} "
            f"(quartiles {low:.3f}, {high:.3f}), of the fastest runs {row['fastest_ratio']:.3f}",
            highlight=False,
        )
    write_json(RESULTS, {"torch": torch.__version__, "device": "cpu", "runs": rows})
    sys.exit(0 if max(row["fastest_ratio"] for row in rows) <= LIMIT else CHECK_FAILED)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.overhead")
