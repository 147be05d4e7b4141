"""Timelines worked out by hand, on chains of three steps with round costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import Forward, StepCost
from evoplan.cost_model.trace import Work
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.schedules.replay import Replay, replay
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence, forward_runs
from tests.brute_force import schedules

CHUNK = Strategy("chunk", "row", 2)


def cost(
    forward: int, preserved: int, backward: int, discard: int, seconds: tuple[float, float], strategy=WHOLE
) -> StepCost:
    """Bytes of a step: its forward, what it preserves, its backward, its discarding run."""
    work = Work(), Work(), Work()
    return StepCost(strategy, forward, preserved, backward, discard, *work, seconds[0], *seconds)


# One stream of 10 bytes; step i takes 10^i seconds forward and twice that backward.
CHAIN = CostTable(
    options=(
        (cost(15, 3, 25, 12, (1, 2)), cost(11, 0, 24, 11, (3, 6), CHUNK)),
        (cost(18, 5, 28, 13, (10, 20)), cost(12, 0, 26, 12, (30, 60), CHUNK)),
        (cost(21, 7, 33, 14, (100, 200)), cost(13, 0, 29, 13, (300, 600), CHUNK)),
    ),
    step_reads=(("m",), ("m",), ("m",)),
    groups=(range(3),),
    state_bytes={"m": 10},
    loss_bytes=10,
    training=True,
)

# Row attention reads m and z and rewrites m; the outer product mean reads m and rewrites z; then
# a step of z alone. m has 10 bytes and z has 6, so gradients have 16.
TWO = CostTable(
    options=(
        (cost(14, 3, 20, 12, (1, 2)),),
        (cost(11, 4, 22, 8, (10, 20)),),
        (cost(9, 2, 19, 7, (100, 200)),),
    ),
    step_reads=(("m", "z"), ("z", "m"), ("z",)),
    groups=(range(3),),
    state_bytes={"m": 10, "z": 6},
    loss_bytes=16,
    training=True,
)


def saved(*steps: int) -> tuple[Run, ...]:
    """Those steps recorded whole."""
    return tuple(Run(step, WHOLE) for step in steps)


def again(*parts: Run | Checkpoint) -> Checkpoint:
    """A checkpoint over those parts, whole in its first pass."""
    body = Sequence(parts)
    return Checkpoint(body, (WHOLE,) * len(body.span))


def timeline(schedule: Sequence, table: CostTable) -> tuple[Replay, list[tuple]]:
    """The replay and its moments: phase, step, held, peak, seconds."""
    played = replay(schedule, table)
    return played, [(m.phase, m.step, m.held_bytes, m.peak_bytes, m.seconds) for m in played.moments]


def test_saved_steps() -> None:
    """Forward piles up what is preserved and each new m; backward takes it down again."""
    played, moments = timeline(Sequence(saved(0, 1, 2)), CHAIN)
    assert moments == [
        ("forward", 0, 0, 0 + 15, 1),
        ("forward", 1, 3 + 10, 13 + 18, 10),  # preserved by 0, m after 0
        ("forward", 2, 13 + 5 + 10, 28 + 21, 100),
        ("loss", None, 28 + 7 + 10, 45 + 10, 0),
        ("backward", 2, 45 - 7, 38 + 33, 200),  # its 33 include the 7 it preserved
        ("backward", 1, 38 - 10 - 5, 23 + 28, 20),  # m after 1 is gone; m after 2 is the output
        ("backward", 0, 23 - 10 - 3, 10 + 25, 2),
    ]
    assert (played.output_bytes, played.peak_bytes, played.seconds) == (10, 71, 333)
    assert played.peak.phase == "backward"


def test_one_checkpoint() -> None:
    """Steps 0 and 1 leave nothing but m after 1, and run again with 10 bytes of gradients live."""
    played, moments = timeline(Sequence((again(*saved(0, 1)), *saved(2))), CHAIN)
    assert moments == [
        ("discard", 0, 0, 0 + 12, 1),
        ("discard", 1, 10, 10 + 13, 10),  # m after 0
        ("forward", 2, 10, 10 + 21, 100),  # m after 1 in its place
        ("loss", None, 10 + 7 + 10, 27 + 10, 0),
        ("backward", 2, 27 - 7, 20 + 33, 200),
        ("redo", 0, 10 + 10, 20 + 15, 1),  # the output, gradients; m after 1 is gone
        ("redo", 1, 20 + 3 + 10, 33 + 18, 10),
        ("backward", 1, 10 + 3 + 10, 23 + 28, 20),  # nobody keeps m after 1 this time; 28 has gradients
        ("backward", 0, 10, 10 + 25, 2),
    ]
    assert (played.peak_bytes, played.seconds) == (53, 333 + 11)


def test_a_redo_ends_with_what_its_backward_needs() -> None:
    """Nobody reads what step 1 makes then; of step 0, which goes before, all is made."""
    quick = [
        replace(cost[0], unread=Forward(11, Work(), cost[0].forward_seconds / 2)) for cost in CHAIN.options
    ]
    table = replace(
        CHAIN, options=tuple((one, *cost[1:]) for one, cost in zip(quick, CHAIN.options, strict=True))
    )
    _, plain = timeline(Sequence((again(*saved(0, 1)), *saved(2))), CHAIN)
    played, moments = timeline(Sequence((again(*saved(0, 1)), *saved(2))), table)
    assert moments[6] == ("redo", 1, 20 + 3 + 10, 33 + 11, 5)
    assert moments[:6] + moments[7:] == plain[:6] + plain[7:]
    assert played.seconds == 333 + 11 - 5


def test_nested_checkpoints() -> None:
    """Everything runs again; in that, steps 0 and 1 run a third time."""
    schedule = Sequence((again(again(*saved(0, 1)), *saved(2)),))
    played, moments = timeline(schedule, CHAIN)
    assert moments == [
        ("discard", 0, 0, 12, 1),
        ("discard", 1, 10, 10 + 13, 10),
        ("discard", 2, 10, 10 + 14, 100),
        ("loss", None, 10, 10 + 10, 0),  # the output
        ("redo discard", 0, 10 + 10, 20 + 12, 1),  # the output, gradients
        ("redo discard", 1, 20 + 10, 30 + 13, 10),
        ("redo", 2, 20 + 10, 30 + 21, 100),  # m after 1
        ("backward", 2, 10 + 10, 20 + 33, 200),  # the output, m after 1
        ("redo", 0, 10 + 10, 20 + 15, 1),
        ("redo", 1, 20 + 3 + 10, 33 + 18, 10),
        ("backward", 1, 10 + 3 + 10, 23 + 28, 20),
        ("backward", 0, 10, 10 + 25, 2),
    ]
    assert (played.peak_bytes, played.seconds) == (53, 333 + 111 + 11)


def test_a_piecewise_step_that_ends_a_redo_does_not_run_forward() -> None:
    """It keeps its input and nothing else, and nobody reads its output."""
    body = Sequence((*saved(0), Run(1, CHUNK)))
    played, moments = timeline(Sequence((Checkpoint(body, (WHOLE, CHUNK)), *saved(2))), CHAIN)
    assert moments[:2] == [("discard", 0, 0, 12, 1), ("discard", 1, 10, 10 + 12, 30)]  # as discarded
    assert moments[5:] == [
        ("redo", 0, 10 + 10, 20 + 15, 1),
        ("backward", 1, 10 + 3 + 10, 23 + 26, 60),  # from m after 0, with what 0 preserves; no redo
        ("backward", 0, 10, 10 + 25, 2),
    ]
    assert played.seconds == (1 + 30 + 100) + 200 + 1 + 60 + 2


def test_a_piecewise_step_inside_a_redo_runs_forward() -> None:
    """Step 1 reads its output."""
    body = Sequence((Run(0, CHUNK), *saved(1)))
    _, moments = timeline(Sequence((Checkpoint(body, (WHOLE, WHOLE)), *saved(2))), CHAIN)
    assert moments[5:] == [
        ("redo", 0, 10 + 10, 20 + 11, 3),
        ("redo", 1, 20 + 10, 30 + 18, 10),  # a piecewise step preserves nothing
        ("backward", 1, 10 + 10, 20 + 28, 20),
        ("backward", 0, 10, 10 + 24, 6),
    ]


def test_a_piecewise_step_alone_in_a_checkpoint_runs_as_if_recorded() -> None:
    """Apart from its discarding run's own peak, which is what differs from a recorded forward."""
    chunked = tuple(Run(step, CHUNK) for step in range(3))
    alone = tuple(Checkpoint(Sequence((run,)), (CHUNK,)) for run in chunked)
    recorded, checkpointed = timeline(Sequence(chunked), CHAIN)[1], timeline(Sequence(alone), CHAIN)[1]
    assert [row[1:] for row in recorded] == [row[1:] for row in checkpointed]  # 11, 12, 13 either way
    assert [row[0] for row in checkpointed] == ["discard"] * 3 + ["loss"] + ["backward"] * 3


def test_two_streams() -> None:
    """A version is held once however many read it: z after 1 by step 2, m after 0 as an output."""
    played, moments = timeline(Sequence(saved(0, 1, 2)), TWO)
    assert moments == [
        ("forward", 0, 0, 0 + 14, 1),
        ("forward", 1, 3 + 10, 13 + 11, 10),
        ("forward", 2, 13 + 4 + 6, 23 + 9, 100),
        ("loss", None, 23 + 2 + 6, 31 + 16, 0),  # preserved 3 + 4 + 2; m after 0; z after 1 and 2
        ("backward", 2, 31 - 2, 29 + 19, 200),
        ("backward", 1, 29 - 6 - 4, 19 + 22, 20),  # z after 1 is gone
        ("backward", 0, 19 - 3, 16 + 20, 2),  # m after 0 is an output and stays
    ]
    assert (played.output_bytes, played.peak_bytes) == (10 + 6, 48)


def test_two_streams_in_a_checkpoint() -> None:
    """The redo makes m and z anew, beside the outputs, and its step 1 reads the new m."""
    played, moments = timeline(Sequence((again(*saved(0, 1)), *saved(2))), TWO)
    assert moments == [
        ("discard", 0, 0, 0 + 12, 1),
        ("discard", 1, 10, 10 + 8, 10),  # m after 0
        ("forward", 2, 10 + 6, 16 + 9, 100),  # and z after 1
        ("loss", None, 16 + 2 + 6, 24 + 16, 0),
        ("backward", 2, 24 - 2, 22 + 19, 200),
        ("redo", 0, 22 - 6 + 16, 32 + 14, 1),  # m after 0, z after 2: the outputs; gradients
        ("redo", 1, 32 + 3 + 10, 45 + 11, 10),  # a second m after 0
        ("backward", 1, 16 + 3 + 10, 29 + 22, 20),  # held as what step 1 read
        ("backward", 0, 16, 16 + 20, 2),
    ]
    assert (played.output_bytes, played.peak_bytes, played.seconds) == (16, 56, 333 + 11)


def test_a_checkpoint_keeps_what_it_reads_and_nothing_else() -> None:
    """Step 2 under a checkpoint keeps z after 1; in its redo z after 2 is made anew and dropped."""
    _, moments = timeline(Sequence((*saved(0, 1), again(*saved(2)))), TWO)
    assert moments[2:6] == [
        ("discard", 2, 13 + 4 + 6, 23 + 7, 100),
        ("loss", None, 23 + 6, 29 + 16, 0),
        ("redo", 2, 29 + 16, 45 + 9, 100),  # gradients; z after 2 a second time is in the 9
        ("backward", 2, 29, 29 + 19, 200),
    ]


def test_a_recomputed_output_is_held_beside_the_output() -> None:
    """m after 0 is an output; a nested checkpoint leaves a second one for step 1 of the redo."""
    inner = again(*saved(0))
    _, moments = timeline(Sequence((again(inner, *saved(1)), *saved(2))), TWO)
    assert moments[5:9] == [
        ("redo discard", 0, 16 + 16, 32 + 12, 1),  # outputs, gradients
        ("redo", 1, 32 + 10, 42 + 11, 10),
        ("backward", 1, 16 + 10, 26 + 22, 20),
        ("redo", 0, 16 + 16, 32 + 14, 1),
    ]


def test_a_tensor_that_nobody_rewrites_is_no_output() -> None:
    """z is an input here: it is not counted, but its gradient is live."""
    table = replace(CHAIN, step_reads=(("m", "z"), ("m",), ("m",)), state_bytes={"m": 10, "z": 6})
    played, moments = timeline(Sequence((again(*saved(0, 1)), *saved(2))), table)
    assert played.output_bytes == 10
    assert moments[5] == ("redo", 0, 10 + 16, 26 + 15, 1)


# An extra stack: step 0 rewrites its tensor e of 20 bytes, step 1 reads that for z, and nobody else does.
EXTRA = replace(
    TWO,
    options=(
        (cost(24, 3, 50, 22, (1, 2)),),
        (cost(11, 4, 60, 8, (10, 20)),),
        (cost(15, 5, 30, 12, (100, 200)),),
    ),
    step_reads=(("e", "z"), ("z", "e"), ("m", "z")),
    state_bytes={"e": 20, "m": 10, "z": 6},
    outputs=("m", "z"),
)


def test_a_tensor_that_ends_with_its_stack_has_a_gradient_until_then() -> None:
    """A redo before its last reader has it beside it, one that ends after that has not."""
    _, moments = timeline(Sequence((again(*saved(0)), *saved(1, 2))), EXTRA)
    assert moments == [
        ("discard", 0, 0, 0 + 22, 1),
        ("forward", 1, 20, 20 + 11, 10),  # e after 0
        ("forward", 2, 20 + 4 + 6, 30 + 15, 100),  # which step 1 keeps for backward; z after 1
        ("loss", None, 30 + 5 + 10, 45 + 16, 0),
        ("backward", 2, 45 - 5, 40 + 30, 200),
        ("backward", 1, 40 - 4, 36 + 60, 20),
        ("redo", 0, 16 + 20 + 10 + 6, 52 + 24, 1),  # the outputs; gradients of e, m and z
        ("backward", 0, 16, 16 + 50, 2),
    ]
    _, moments = timeline(Sequence((again(*saved(0, 1)), *saved(2))), EXTRA)
    assert moments[5:7] == [
        ("redo", 0, 16 + 10 + 6, 32 + 24, 1),
        ("redo", 1, 16 + 3 + 20 + 10 + 6, 55 + 11, 10),
    ]


def test_the_loss_may_be_the_peak() -> None:
    played = replay(Sequence(saved(0, 1, 2)), replace(CHAIN, loss_bytes=100))
    assert (played.peak.phase, played.peak_bytes) == ("loss", 45 + 100)


@pytest.mark.parametrize("parts", [saved(0, 1, 2), (again(*saved(0, 1)), *saved(2))])
def test_inference_discards_everything(parts: tuple[Run | Checkpoint, ...]) -> None:
    """Each step once, with the state before it; no loss and no backward."""
    played, moments = timeline(Sequence(parts), replace(CHAIN, training=False))
    assert moments == [
        ("discard", 0, 0, 12, 1),
        ("discard", 1, 10, 10 + 13, 10),
        ("discard", 2, 10, 10 + 14, 100),
    ]
    assert (played.output_bytes, played.peak_bytes, played.seconds) == (10, 24, 111)


def test_inference_of_two_streams_holds_both() -> None:
    _, moments = timeline(Sequence(saved(0, 1, 2)), replace(TWO, training=False))
    assert [row[2:4] for row in moments] == [(0, 12), (10, 10 + 8), (10 + 6, 16 + 7)]


@pytest.mark.parametrize("steps", [(0, 1), (1, 2), (0, 1, 2, 3)])
def test_a_schedule_of_other_steps_is_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the chain has"):
        replay(Sequence(saved(*steps)), CHAIN)


def test_an_unknown_strategy_is_refused() -> None:
    unknown = Strategy("chunk", "row", 64)
    with pytest.raises(ValueError, match="step 1 has no cost"):
        replay(Sequence((*saved(0), Run(1, unknown), *saved(2))), CHAIN)
    with pytest.raises(ValueError, match="step 0 has no cost"):
        replay(Sequence((Checkpoint(Sequence(saved(0)), (unknown,)), *saved(1, 2))), CHAIN)


def test_malformed_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="step 1 is missing"):
        Sequence(saved(0, 2))
    with pytest.raises(ValueError, match="at least one part"):
        Sequence(())
    with pytest.raises(ValueError, match="2 steps has 1"):
        Checkpoint(Sequence(saved(0, 1)), (WHOLE,))


@pytest.mark.parametrize("table", [CHAIN, TWO])
def test_every_schedule_of_three_steps(table: CostTable) -> None:
    """It ends with nothing but the outputs, runs backward once per step and forward as counted."""
    last = {"m": 10, "z": 6}
    for schedule in schedules(table):
        played = replay(schedule, table)
        backward = [moment for moment in played.moments if moment.phase == "backward"]
        forward = (moment.step for moment in played.moments if moment.phase not in ("backward", "loss"))
        assert [moment.step for moment in backward] == [2, 1, 0]
        assert backward[-1].held_bytes == sum(last[name] for name in table.state_bytes)
        assert Counter(forward) == forward_runs(schedule)


def test_a_step_that_keeps_what_it_has_made() -> None:
    """The first makes m and e, which only its own backward reads; the second keeps its m, the output."""
    first = replace(cost(20, 3, 30, 15, (1, 2)), keeps_made=(1,))
    second = replace(cost(12, 2, 25, 11, (1, 2)), keeps_made=(0,), backward_held_bytes=40)
    table = CostTable(
        options=((first,), (second,)),
        step_reads=(("m",), ("m",)),
        groups=(range(2),),
        state_bytes={"m": 10, "e": 4},
        loss_bytes=10,
        training=True,
        outputs=("m",),
        step_makes=(("m", "e"), ("m",)),
    )
    played = replay(Sequence(saved(0, 1)), table)
    assert [(m.phase, m.step, m.held_bytes, m.peak_bytes) for m in played.moments] == [
        ("forward", 0, 0, 20),
        ("forward", 1, 3 + 10 + 4, 17 + 12),
        ("loss", None, 17 + 2 + 10, 29 + 10),
        ("backward", 1, 29 - 2, 27 + 40),  # its m is held at the end, too
        ("backward", 0, 10, 10 + 30),  # of e nobody else knows
    ]
