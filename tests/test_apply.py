"""Any schedule: same loss, same gradients, dropout included."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from evoplan.model import Chain, EvoformerStack
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import EAGER, Strategy
from evoplan.model.running.submodule import IndependentAxis
from evoplan.planner import NoPlanError, apply_plan, make_plan
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.shapes import Fit, Fits
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from tests.conftest import TILES, TINY, random_inputs, randomise


def random_strategy(step, rng: random.Random, whole: bool = False) -> Strategy:
    axis = rng.choice([None, *(() if whole else step.submodule.axes)])
    kernel = rng.choice([EAGER, *TILES]) if step.submodule.attends else EAGER
    if axis is None:
        return Strategy(rng.choice(["whole", "lean"]), kernel=kernel)
    if isinstance(axis, IndependentAxis):
        return Strategy("chunk", axis.name, rng.choice([1, 2, 3, 5]), kernel)
    return Strategy("coshard", axis.name, min(rng.choice([1, 2, 3]), axis.size), kernel)


def random_schedule(
    chain: Chain, span: range, rng: random.Random, depth: int, whole: bool = False
) -> Sequence:
    """Cut the span anywhere; every part is a recorded step or a checkpoint, nested up to `depth`."""
    parts, at = [], span.start
    while at < span.stop:
        length = rng.randint(1, span.stop - at)
        if depth and rng.random() < 0.6:
            body = random_schedule(chain, range(at, at + length), rng, depth - 1, whole)
            discard = tuple(random_strategy(chain.steps[i], rng, whole) for i in body.span)
            parts.append(Checkpoint(body, discard))
            at += length
        else:
            parts.append(Run(at, random_strategy(chain.steps[at], rng, whole)))
            at += 1
    return Sequence(tuple(parts))


def loss_and_gradients(model, stack, inputs):
    torch.manual_seed(5)  # the same dropout masks
    m, z = model(**inputs)
    loss = (m * torch.linspace(-1, 2, m.numel(), dtype=m.dtype).view_as(m)).square().mean()
    loss = loss + (z * torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view_as(z)).square().mean()
    leaves = [inputs["m"], inputs["z"], *stack.parameters()]
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_are_exact(stack: EvoformerStack, seed: int) -> None:
    rng = random.Random(seed)
    chain = Chain.of(stack)
    schedule = random_schedule(chain, range(len(chain.steps)), rng, depth=3)
    inputs = random_inputs(TINY, batch=(2,) if seed % 3 == 0 else (), seed=seed)
    loss, gradients = loss_and_gradients(stack, stack, inputs)
    planned_loss, planned = loss_and_gradients(PlannedModule(stack, schedule), stack, inputs)
    torch.testing.assert_close(planned_loss, loss, rtol=1e-12, atol=0)
    largest = max(g.abs().max() for g in gradients)
    for expected, got in zip(gradients, planned, strict=True):
        assert (expected - got).abs().max() <= 1e-11 * largest


def test_gradients_that_do_not_flow(stack: EvoformerStack) -> None:
    """A loss on m alone leaves the last pair steps out; they are skipped, also inside a checkpoint."""
    chain = Chain.of(stack)
    body = Sequence(tuple(Run(i, WHOLE) for i in range(9, 18)))
    schedule = Sequence((*(Run(i, WHOLE) for i in range(9)), Checkpoint(body, (WHOLE,) * 9)))
    inputs = random_inputs(TINY)
    torch.manual_seed(1)
    expected = torch.autograd.grad(stack(**inputs)[0].square().mean(), inputs["m"])
    torch.manual_seed(1)
    got = torch.autograd.grad(PlannedModule(stack, schedule)(**inputs)[0].square().mean(), inputs["m"])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert len(chain.steps) == 18


def test_second_backward_says_what_to_do(stack: EvoformerStack) -> None:
    schedule = Sequence(tuple(Run(i, WHOLE) for i in range(18)))
    loss = PlannedModule(stack, schedule)(**random_inputs(TINY))[0].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="call forward again"):
        loss.backward()


def test_other_shapes_are_refused(stack: EvoformerStack) -> None:
    schedule = Sequence(tuple(Run(i, WHOLE) for i in range(18)))
    planned = PlannedModule(stack, Fits([Fit(schedule, {"m": (5, 7, 12), "z": (7, 7, 10)})]))
    with pytest.raises(ValueError, match=r"for m of shape \(5, 7, 12\), not \(6, 7, 12\)"):
        planned(**random_inputs(TINY, s=6))


def test_inference_equals_training_forward(stack: EvoformerStack) -> None:
    chain = Chain.of(stack.eval())
    schedule = random_schedule(chain, range(18), random.Random(3), depth=2)
    inputs = random_inputs(TINY)
    with torch.no_grad():
        for expected, got in zip(stack(**inputs), PlannedModule(stack, schedule)(**inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_inputs_that_the_plan_was_made_for_have_room() -> None:
    """An expanded mask takes what its one row takes, and the copy that is made of it."""
    stack = randomise(EvoformerStack(replace(TINY, n_block=1)).double()).eval()
    inputs = random_inputs(TINY, s=2, r=3, batch=(3,))
    one = inputs["pair_mask"][:1]
    given = [inputs["m"], inputs["z"], inputs["msa_mask"], one.expand(3, 3, 3)]
    how = {"mode": "inference", "times": "roofline"}
    with pytest.raises(NoPlanError) as error:
        make_plan(stack, given, 1, **how)
    planned = apply_plan(stack, make_plan(stack, given, error.value.least_feasible_bytes, **how))
    with torch.no_grad():
        torch.testing.assert_close(planned(*given), stack(*given))
