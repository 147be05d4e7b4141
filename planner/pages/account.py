"""The memory of a plan moment by moment, with names: what pages and traces are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.liveness import INPUT
from evoplan.planner.schedules.holdings import Held, Holdings, holdings
from evoplan.planner.schedules.replay import Moment
from evoplan.planner.schedules.schedule import Schedule

# What plans call the parts of their static memory in short.
STATIC = {
    "gradients": "gradients of the parameters",
    "optimizer": "states of the optimizer",
    "workspace": "workspace of the device's libraries",
    "reserve": "reserve for what is not in the plan",
}


@dataclass(frozen=True)
class Account:
    """Everything that is live while a plan runs.

    Attributes:
        title: what is run, in a line.
        names: of the steps.
        static: parts in bytes, by name, that are live throughout; outputs, which the chain makes, are none.
        output_bytes: counted as static by predictions, and not here.
        holdings: what is live when.
    """

    title: str
    names: tuple[str, ...]
    static: dict[str, int]
    output_bytes: int
    holdings: Holdings

    @property
    def moments(self) -> tuple[Moment, ...]:
        """All that runs, in order."""
        return self.holdings.replay.moments

    @property
    def fixed_bytes(self) -> int:
        """What is live at every moment."""
        return sum(self.static.values())

    @property
    def peak_bytes(self) -> int:
        """The most that is live, static parts included."""
        return self.fixed_bytes + self.holdings.replay.peak_bytes

    @property
    def peak_index(self) -> int:
        """The moment of the peak."""
        return self.moments.index(self.holdings.replay.peak)

    def where(self, moment: Moment) -> str:
        """The step of a moment, by name."""
        if moment.step is not None:
            return self.names[moment.step]
        return "the loss" if moment.phase == "loss" else "the end"

    def describe(self, held: Held) -> str:
        """What something is, and who made it."""
        if held.kind == "preserved":
            return f"kept by {self.names[held.step]}"
        made = "the input" if held.step == INPUT else f"made by {self.names[held.step]}"
        return f"{'gradient of ' if held.kind == 'gradients' else ''}{held.name}, {made}"


def account_of(
    title: str, names: Sequence[str], schedule: Schedule, table: CostTable, static: Mapping[str, int]
) -> Account:
    """The account of a schedule on its cost table.

    Args:
        static: as a plan has it, outputs among them where the chain's are.

    Raises:
        ValueError: the schedule is for another table.
    """
    parts = {STATIC.get(name, name): size for name, size in static.items() if size and name != "outputs"}
    return Account(title, tuple(names), parts, static.get("outputs", 0), holdings(schedule, table))
