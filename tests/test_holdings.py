"""What is live at each moment of a schedule, and whose it is: every byte that the replay counts, once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evoplan.cost_model.costs import CostTable
from evoplan.planner.schedules.holdings import Holdings, holdings
from evoplan.planner.schedules.schedule import Sequence
from tests.brute_force import schedules
from tests.test_inference import away_at, tiny_table
from tests.test_replay import CHAIN, TWO, again, saved


def held_at(found: Holdings, at: int) -> dict[str, int]:
    """Bytes of a moment by kind, added up from what is held."""
    sizes = dict.fromkeys(("state", "preserved", "gradients"), 0)
    for one in found.live(at):
        sizes[one.kind] += one.bytes
    return sizes | {"workspace": found.workspace[at]}


@pytest.mark.parametrize("table", [CHAIN, TWO], ids=["one stream", "two streams"])
def test_every_byte_of_every_moment_has_an_owner(table: CostTable) -> None:
    seen = 0
    for schedule in schedules(table):
        found = holdings(schedule, table)
        for at, (moment, parts) in enumerate(zip(found.replay.moments, found.parts, strict=True)):
            assert parts == held_at(found, at)
            assert sum(parts.values()) == moment.peak_bytes
            assert min(parts.values()) >= 0
            if moment.phase != "backward":  # whose own cost counts gradients and what it preserves
                before = parts["state"] + parts["preserved"]
                before += parts["gradients"] if moment.phase.startswith("redo") else 0
                assert before == moment.held_bytes
        seen += 1
    assert seen > 10


def test_owners_of_a_checkpoint_by_hand() -> None:
    # Steps 0 and 1 again, then 2 saved; 10 bytes of m, of which the first is the caller's.
    found = holdings(Sequence((again(*saved(0, 1)), *saved(2))), CHAIN)
    moments = [(m.phase, m.step) for m in found.replay.moments]
    assert moments == [
        ("discard", 0), ("discard", 1), ("forward", 2), ("loss", None), ("backward", 2),
        ("redo", 0), ("redo", 1), ("backward", 1), ("backward", 0),
    ]  # fmt: skip
    assert [parts["preserved"] for parts in found.parts] == [0, 0, 0, 7, 7, 0, 3, 8, 3]
    assert [parts["state"] for parts in found.parts] == [0, 10, 10, 20, 20, 10, 20, 20, 10]
    assert [parts["gradients"] for parts in found.parts] == [0, 0, 0, 10, 10, 10, 10, 10, 10]
    assert [run and run.level for run in found.passes] == [0, 0, 0, None, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("step", "name"), [(4, "m"), (14, "m")])
def test_state_on_the_host_is_not_counted(step: int, name: str) -> None:
    table = replace(tiny_table(), host_bandwidth=1e9)
    found = holdings(away_at(step, name), table)
    for at, (moment, parts) in enumerate(zip(found.replay.moments, found.parts, strict=True)):
        assert parts == held_at(found, at)
        assert parts["state"] == moment.held_bytes
        assert sum(parts.values()) == moment.peak_bytes
        if moment.phase == "discard" and moment.step == step:
            assert name not in {one.name for one in found.live(at)}
