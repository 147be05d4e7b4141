"""What training keeps in host memory: planned as by exhaustive search, predicted to the byte, and no gradient
other than without.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from evoplan.cost_model import measure
from evoplan.cost_model.casting import casting_of
from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.simulation import simulated
from evoplan.cost_model.trace import fake_copy
from evoplan.model import Chain, EvoformerConfig, EvoformerStack, InputShape
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.kinds import WHOLE
from evoplan.planner import simulate_plan
from evoplan.planner.checking.trial import Trial
from evoplan.planner.checking.trial import random_inputs as inputs_of
from evoplan.planner.commands.cli import cli
from evoplan.planner.commands.terminal import run_command
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.host import FakeHost, Host, Waiting
from evoplan.planner.plans.certify import certify
from evoplan.planner.plans.plan import load_plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.plans.sealed import PlanFileError
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.problems.problem import Mixed, Problem
from evoplan.planner.schedules.holdings import holdings
from evoplan.planner.schedules.offload import has_record, last_read, waiting_bytes
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import RECORD, Checkpoint, Run, Sequence
from evoplan.planner.schedules.text import schedule_from_json, schedule_to_json
from evoplan.planner.solvers.dp import Program
from evoplan.planner.solvers.frontier import Frontier, InfeasibleError
from evoplan.planner.solvers.offload import OffloadProgram
from evoplan.planner.solvers.offload_frontier import OffloadFrontier, offload_bound
from tests.brute_force import schedules
from tests.conftest import TINY, random_inputs, random_schedule_of, randomise
from tests.test_dp import UNITS, cases, tables

CONFIG = EvoformerConfig(2, 24, 20, 4, 2, 8, 8, 40, 2, c_head_msa=8)
SHAPE = InputShape(11, 13)


def with_waits(schedule: Sequence, liveness: Any, rng: random.Random, share: float = 0.7) -> Sequence:
    """The schedule, of which much of what may wait does."""
    parts = []
    for part in schedule.parts[:-1]:
        may = [version.tensor for version in last_read(liveness, part.span)]
        if isinstance(part, Run) and has_record(part.strategy):
            may.append(RECORD)
        parts.append(replace(part, wait=tuple(name for name in may if rng.random() < share)))
    return Sequence((*parts, schedule.parts[-1]))


def random_of(table: CostTable, stack: EvoformerStack, rng: random.Random) -> Sequence:
    """A random schedule of the table's own strategies."""
    shape = random_schedule_of(stack, rng.randint(0, 99))

    def known(body: Sequence) -> Sequence:
        return Sequence(tuple(map(one, body.parts)))

    def some(step: int) -> Any:
        return rng.choice([c.strategy for c in table.options[step] if "compiled" not in str(c.strategy)])

    def one(part: Run | Checkpoint) -> Run | Checkpoint:
        if isinstance(part, Run):
            return Run(part.step, some(part.step))
        return Checkpoint(known(part.body), tuple(map(some, part.span)))

    return known(shape)


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


# --- the executor -------------------------------------------------------------------------------


def loss_and_gradients(model: Any, stack: EvoformerStack, inputs: dict[str, Any]) -> list[torch.Tensor]:
    loss = mean_square(*model(**inputs, dropout_seed=3))
    return [loss, *torch.autograd.grad(loss, [inputs["m"], inputs["z"], *stack.parameters()])]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    largest = max(float(tensor.detach().abs().max()) for tensor in expected[1:])
    for one, other in zip(got, expected, strict=True):
        assert float((one - other).detach().abs().max()) <= 1e-12 * max(largest, 1.0)


class SlowHost(Host):
    """Copies are made when it pleases a random number, in order each way, and at the latest when they must.

    What has room again and no content yet is not a number.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.queues, self.moved = rng, {False: [], True: []}, 0
        self.pace = rng.choice([0.0, 0.01, 0.1, 0.5])

    def _copy(self, one: Waiting, back: bool) -> None:
        if back:
            here = torch.empty(0, dtype=torch.uint8).set_(one.storage)
            here.fill_(255)  # of every floating dtype a NaN
        self.queues[back].append(one)

    def tick(self) -> None:
        """Time goes by."""
        for back, queue in self.queues.items():
            while queue and self.rng.random() < self.pace:
                self._make(queue.pop(0), back)

    def _make(self, one: Waiting, back: bool) -> None:
        super()._copy(one, back)
        self.moved += 1

    def gone(self, waiting: Any) -> None:
        waiting = list(waiting)
        self._until(waiting, False)
        super().gone(waiting)

    def there(self, waiting: Any) -> None:
        waiting = list(waiting)
        self._until(waiting, True)
        super().there(waiting)

    def _until(self, waiting: list[Waiting], back: bool) -> None:
        queue = self.queues[back]
        while any(one in queue for one in waiting):
            self._make(queue.pop(0), back)


class Ticking(TorchDispatchMode):
    """Lets time go by with every operator."""

    def __init__(self, host: SlowHost) -> None:
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch._C._len_torch_dispatch_stack():  # not while it copies itself
            self.host.tick()
        return func(*args, **(kwargs or {}))


def interleavings(seeds: range) -> None:
    """Random schedules under random schedulers."""
    config = replace(TINY, n_block=1)
    stack = randomise(EvoformerStack(config).double()).train()
    liveness = PlannedModule(stack, random_schedule_of(stack, 0)).liveness
    inputs = random_inputs(config, s=3, r=4)
    expected = loss_and_gradients(stack, stack, inputs)
    moved = 0
    for seed in seeds:
        rng = random.Random(seed)
        schedule = with_waits(random_schedule_of(stack, seed), liveness, rng)
        host = SlowHost(rng)
        planned = PlannedModule(stack, schedule, host=lambda host=host: host)
        with Ticking(host):
            assert_same(loss_and_gradients(planned, stack, inputs), expected)
        assert not any(host.queues.values())
        moved += host.moved
    assert moved > 2 * len(seeds)


def test_interleavings() -> None:
    interleavings(range(25))


@pytest.mark.slow
def test_a_thousand_interleavings() -> None:
    interleavings(range(60, 1060))


@pytest.mark.parametrize("seed", range(8))
def test_gradients_are_exact_and_memory_is_given_back(stack: EvoformerStack, seed: int) -> None:
    stack.train()
    rng = random.Random(seed)
    whole = random_schedule_of(stack, seed)
    liveness = PlannedModule(stack, whole).liveness
    schedule = with_waits(whole, liveness, rng, 1.0)
    inputs = random_inputs(TINY, batch=(2,) if seed % 2 else ())
    expected = loss_and_gradients(stack, stack, inputs)
    planned = PlannedModule(stack, schedule)
    assert_same(loss_and_gradients(planned, stack, inputs), expected)

    def at_the_loss(model: PlannedModule) -> int:
        return measure.usage(lambda: kept.append(model(**inputs, dropout_seed=3))).left

    kept: list[Any] = []
    away = sum(len(part.wait) for part in schedule.parts)
    assert (at_the_loss(planned) < at_the_loss(PlannedModule(stack, whole))) == bool(away)


def all_waiting(stack: EvoformerStack, seed: int = 1) -> Sequence:
    """Everything waits that may, a record at least."""
    liveness = PlannedModule(stack, random_schedule_of(stack, 0)).liveness
    seeds = itertools.count(100 * seed)
    found = (with_waits(random_schedule_of(stack, s), liveness, random.Random(0), 1.0) for s in seeds)
    return next(schedule for schedule in found if any(RECORD in part.wait for part in schedule.parts))


def test_backward_again_and_two_forwards_at_once(stack: EvoformerStack) -> None:
    stack.eval()
    planned = PlannedModule(stack, all_waiting(stack))
    inputs, others = random_inputs(TINY), random_inputs(TINY, seed=5)
    leaves = [inputs["m"], inputs["z"], *stack.parameters()]
    expected = torch.autograd.grad(mean_square(*stack(**inputs)), leaves)
    loss, other = mean_square(*planned(**inputs)), mean_square(*planned(**others))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.autograd.grad(other, [others["m"]])
    second = torch.autograd.grad(loss, leaves)
    for one, two, true in zip(first, second, expected, strict=True):
        torch.testing.assert_close(one, true, rtol=0, atol=1e-12)
        assert torch.equal(one, two)


def test_a_loss_that_leaves_steps_out(stack: EvoformerStack) -> None:
    """The last steps make z alone: backward comes past their parts, and what waits for it is there."""
    stack.eval()
    inputs = random_inputs(TINY)
    expected = torch.autograd.grad(stack(**inputs)[0].square().mean(), inputs["m"])
    kept = Sequence(tuple(Run(step, WHOLE) for step in range(18)))
    kept = with_waits(kept, PlannedModule(stack, kept).liveness, random.Random(0), 1.0)
    # Step 12, of which the loss wants nothing, is the last to read the z that row attention has read.
    assert "z" in kept.parts[12].wait
    for schedule in (kept, *(all_waiting(stack, seed) for seed in range(1, 4))):
        got = torch.autograd.grad(PlannedModule(stack, schedule)(**inputs)[0].square().mean(), inputs["m"])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_evaluation_and_frozen_parts(stack: EvoformerStack) -> None:
    stack.eval()
    planned = PlannedModule(stack, all_waiting(stack))
    inputs = {name: tensor.detach() for name, tensor in random_inputs(TINY).items()}
    with torch.no_grad():
        for one, other in zip(planned(**inputs), stack(**inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for parameter in stack.blocks[0].parameters():
        parameter.requires_grad_(False)
    leaves = list(stack.blocks[1].parameters())
    expected = torch.autograd.grad(mean_square(*stack(**inputs)), leaves)
    for one, other in zip(
        torch.autograd.grad(mean_square(*planned(**inputs)), leaves), expected, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_what_a_hook_has_seen_stays(stack: EvoformerStack) -> None:
    stack.eval()
    planned, seen = PlannedModule(stack, all_waiting(stack)), []
    inputs = random_inputs(TINY)
    handle = stack.blocks[0].register_forward_hook(lambda module, args, result: seen.append(result))
    with pytest.warns(UserWarning, match="nothing waits in host memory"):
        loss = mean_square(*planned(**inputs))
    assert all(tensor.untyped_storage().nbytes() for result in seen for tensor in result)
    loss.backward()
    handle.remove()


class Seeing(torch.nn.Module):
    """A layer that keeps what it is given and gives, and scales by a buffer and by a tensor that is none."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", torch.linspace(0.5, 1.5, layer.out_features, dtype=torch.float64))
        self.other = torch.linspace(1.5, 0.5, layer.out_features, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x, self.layer(x) * self.scale * self.other
        return self.seen[1]


def test_what_layers_keep_stays(stack: EvoformerStack) -> None:
    """A record's own is what nobody else holds: neither buffers nor what a layer or a hook on it keeps."""
    stack.eval()
    seen: list[torch.Tensor] = []
    for block in stack.blocks:
        for name, layer in list(block.named_modules()):
            if name.endswith("linear_q"):
                owner, _, last = name.rpartition(".")
                setattr(block.get_submodule(owner), last, Seeing(layer))
            elif isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda module, args, result: seen.extend((*args, result)))
    inputs = random_inputs(TINY)
    expected = loss_and_gradients(stack, stack, inputs)
    whole = Sequence(tuple(Run(step, WHOLE) for step in range(18)))
    planned = PlannedModule(
        stack, with_waits(whole, PlannedModule(stack, whole).liveness, random.Random(0), 1.0)
    )
    seen.clear()
    loss = mean_square(*planned(**inputs, dropout_seed=3))
    kept = [tensor for layer in stack.modules() if isinstance(layer, Seeing) for tensor in layer.seen]
    for tensor in (*stack.buffers(), *kept, *seen):
        assert tensor.untyped_storage().nbytes() >= tensor.nbytes
    with torch.no_grad():
        torch.testing.assert_close(mean_square(*planned(**inputs)), expected[0], rtol=0, atol=1e-12)
    leaves = [inputs["m"], inputs["z"], *stack.parameters()]
    assert_same([loss, *torch.autograd.grad(loss, leaves)], expected)


def test_what_a_hook_on_a_norm_has_seen_stays(stack: EvoformerStack) -> None:
    stack.eval()
    planned, seen = PlannedModule(stack, all_waiting(stack)), []
    norm = stack.blocks[0].msa_transition.norms["m"]
    norm.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    with pytest.warns(UserWarning, match="nothing waits in host memory"):
        planned(**random_inputs(TINY))
    assert all(tensor.untyped_storage().nbytes() for tensor in seen)


def test_a_checkpoint_around_it_keeps_the_state(stack: EvoformerStack) -> None:
    """What runs forward again there is not what runs backward: nothing of it may be elsewhere then."""
    stack.eval()
    inputs = random_inputs(TINY)
    expected = loss_and_gradients(stack, stack, inputs)
    whole = Sequence(tuple(Run(step, WHOLE) for step in range(18)))
    liveness = PlannedModule(stack, whole).liveness
    parts = [
        replace(part, wait=tuple(version.tensor for version in last_read(liveness, part.span)))
        for part in whole.parts[:-1]
    ]
    planned = PlannedModule(stack, Sequence((*parts, whole.parts[-1])))

    def around(**arguments: Any) -> Any:
        return checkpoint(planned, use_reentrant=False, **arguments)

    with pytest.warns(UserWarning, match=r"nothing waits in host memory.*torch\.utils\.checkpoint"):
        assert_same(loss_and_gradients(around, stack, inputs), expected)


class Keeps(torch.nn.LayerNorm):
    """A norm of somebody's own, which keeps what it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x.detach()
        return super().forward(x)


def test_what_a_norm_of_ones_own_keeps_stays(stack: EvoformerStack) -> None:
    stack.eval()
    norms = stack.blocks[0].msa_transition.norms
    width = norms["m"].normalized_shape
    norms["m"] = Keeps(width).double()
    planned = PlannedModule(stack, all_waiting(stack))
    with pytest.warns(UserWarning, match="a norm was replaced"):
        loss = mean_square(*planned(**random_inputs(TINY)))
    assert norms["m"].last.untyped_storage().nbytes()
    loss.backward()


def test_written_in_place_is_noticed_where_it_waits(stack: EvoformerStack) -> None:
    """The state between two steps is nobody's but the chain's; a parameter that is written is named."""
    stack.eval()
    planned = PlannedModule(stack, all_waiting(stack))
    loss = mean_square(*planned(**random_inputs(TINY)))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def _keep(kept: list[Any], model: PlannedModule, inputs: dict[str, torch.Tensor]) -> None:
    kept.append(model(**inputs, dropout_seed=3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("seed", range(4))
def test_gradients_and_memory_on_a_gpu(stack: EvoformerStack, seed: int) -> None:
    """Streams, events and pinned memory: the same gradients, and less on the device at the loss."""
    stack.cuda().eval()
    inputs = {name: tensor.detach().cuda() for name, tensor in random_inputs(TINY).items()}
    inputs |= {name: inputs[name].requires_grad_() for name in ("m", "z")}
    expected = loss_and_gradients(stack, stack, inputs)
    schedule = all_waiting(stack, seed)
    bare = Sequence(tuple(replace(part, wait=()) for part in schedule.parts))
    left = []
    for one in (bare, schedule):
        planned, kept = PlannedModule(stack, one), []
        left.append(measure.usage(partial(_keep, kept, planned, inputs), "cuda").left)
        kept.clear()
        for _ in range(3):  # memory is used again while copies go on
            assert_same(loss_and_gradients(planned, stack, inputs), expected)
    assert left[1] < left[0]


# --- the solver ---------------------------------------------------------------------------------


def charged(schedule: Sequence, table: CostTable) -> tuple[int, float]:
    """Peak without outputs and seconds, as the program charges them; nothing here is taken from it."""
    costs = [{cost.strategy: cost for cost in options} for options in table.options]
    last = {name: step for step, names in enumerate(table.makes) for name in names}
    gradients, peaks = sum(table.state_bytes.values()), [0]

    def size(names: Any) -> int:
        return sum(table.state_bytes[name] for name in names)

    def discarding(part: Checkpoint, held: int) -> float:
        made: set[str] = set()
        for step, strategy in zip(part.span, part.discard, strict=True):
            peaks.append(held + size(made) + costs[step][strategy].discard_bytes)
            made |= set(table.makes[step])
        return sum(
            costs[s][strategy].discard_seconds for s, strategy in zip(part.span, part.discard, strict=True)
        )

    def exits(span: range, redo: bool) -> int:
        made = {name: step for step in span for name in table.makes[step]}
        return size(name for name, step in made.items() if redo or last[name] != step)

    def redo(body: Sequence, held: int) -> float:
        seconds = 0.0
        for number, part in enumerate(body.parts):
            ends = number == len(body.parts) - 1
            if isinstance(part, Checkpoint):
                seconds += 0.0 if ends else discarding(part, held + gradients)
                seconds += redo(part.body, held)
                held += 0 if ends else exits(part.span, True)
                continue
            cost = costs[part.step][part.strategy]
            peaks.append(held + cost.backward_bytes)
            seconds += cost.backward_seconds
            run = cost.ending if ends else cost.forward
            if run is not None:
                peaks.append(held + gradients + run.bytes)
                seconds += run.seconds
                held += cost.preserved_bytes + size(table.makes[part.step])
        return seconds

    held = leaves = 0
    total = 0.0
    sizes = waiting_bytes(schedule, table)
    for part, waits in zip(schedule.parts, sizes, strict=True):
        if isinstance(part, Checkpoint):
            forward = discarding(part, held + leaves)
            backward = redo(part.body, held + leaves)
            kept = exits(part.span, False)
        else:
            cost = costs[part.step][part.strategy]
            output = size(name for name in table.makes[part.step] if last[name] == part.step)
            peaks += [held + leaves + cost.backward_bytes, held + leaves + cost.forward_bytes - output]
            forward, backward = cost.forward_seconds, cost.backward_seconds
            kept = cost.preserved_bytes + size(table.makes[part.step]) - output
        copy = leaves / table.host_bandwidth
        total += max(forward, copy) + max(backward, copy)
        held, leaves = held + kept - waits, waits
    peaks.append(held + table.loss_bytes)
    return max(peaks), total


def every_discard(schedule: Sequence, table: CostTable) -> Iterator[Sequence]:
    """The schedule with every choice of its discarding strategies."""

    def ways(part: Run | Checkpoint) -> list[Run | Checkpoint]:
        if isinstance(part, Run):
            return [part]
        discards = list(product(*([cost.strategy for cost in table.options[step]] for step in part.span)))
        return [Checkpoint(body, discard) for body in every_discard(part.body, table) for discard in discards]

    yield from map(Sequence, product(*map(ways, schedule.parts)))


def every_wait(schedule: Sequence, table: CostTable) -> Iterator[Sequence]:
    """The schedule with every choice of what waits."""

    def ways(part: Run | Checkpoint) -> list[Run | Checkpoint]:
        may = [version.tensor for version in last_read(table.liveness, part.span)]
        if isinstance(part, Run) and has_record(part.strategy):
            may.append(RECORD)
        subsets = [some for count in range(len(may) + 1) for some in combinations(may, count)]
        return [replace(part, wait=some) for some in subsets]

    *first, last = schedule.parts
    for parts in product(*map(ways, first)):
        yield Sequence((*parts, last))


@cases(40)
@given(tables(steps=(2, 3)), st.sampled_from([0.3, 1.0, 3.0]))
def test_it_finds_the_optimum_of_its_class(table: CostTable, bandwidth: float) -> None:
    table = replace(table, host_bandwidth=bandwidth)
    best = np.full(UNITS + 1, np.inf)
    for bare in schedules(table):
        for discarding in every_discard(bare, table):
            for schedule in every_wait(discarding, table):
                peak, seconds = charged(schedule, table)
                np.minimum(best[peak:], seconds, out=best[peak:])
    program = OffloadProgram(Program(table, 1, UNITS), bandwidth)
    np.testing.assert_allclose(program.times, best, rtol=1e-12)
    outputs = table.bytes_of(table.liveness.outputs)
    for memory in np.flatnonzero(np.isfinite(program.times)):
        played = replay(program.schedule(int(memory)), table)
        assert played.peak_bytes <= memory + outputs
        assert played.seconds == pytest.approx(program.times[memory])


@cases(30)
@given(tables(steps=(2, 4)), st.integers(2, 7))
def test_coarse_grids_bound_it_from_both_sides(table: CostTable, unit: int) -> None:
    table = replace(table, host_bandwidth=1.0)
    exact = OffloadProgram(Program(table, 1, UNITS), 1.0).times
    above = OffloadProgram(Program(table, unit, UNITS // unit), 1.0).times
    below = OffloadProgram(Program(table, unit, UNITS // unit, optimistic=True), 1.0).times
    for units in range(UNITS // unit + 1):
        assert below[units] <= exact[units * unit] * (1 + 1e-12)
        assert exact[units * unit] <= above[units] * (1 + 1e-12)


def asked(**update: Any) -> Problem:
    given = {"config": CONFIG, "shape": InputShape(24, 32), "device": "a100-40gb", "host_bytes": 2**30}
    return Problem(model="custom", **(given | update))


def test_it_is_never_slower_than_without_and_keeps_to_host_memory() -> None:
    costed = cost_problem(asked(config=replace(CONFIG, n_block=4)))
    table, plain = costed.table, Frontier(costed.table)
    found = OffloadFrontier(table, 2**30)
    assert found.least_replay.peak_bytes <= plain.least_replay.peak_bytes
    gained = 0
    for budget in found.budgets(3):
        played = replay(found.schedule(budget), table)
        assert played.peak_bytes <= budget
        assert played.seconds <= plain.seconds(budget) * (1 + 1e-9)
        assert played.seconds >= offload_bound(table, budget) * (1 - 1e-9)
        gained += played.seconds < 0.95 * plain.seconds(budget)
        short = OffloadFrontier(table, max(1, played.host_bytes // 2))
        if played.host_bytes and np.isfinite(plain.seconds(budget)):
            less = replay(short.schedule(budget), table)
            assert less.host_bytes <= played.host_bytes // 2
            assert less.peak_bytes <= budget
            assert played.seconds <= less.seconds * (1 + 1e-9)
    assert gained
    with pytest.raises(InfeasibleError):
        found.schedule(found.least_replay.peak_bytes // 2)


def test_nothing_waits_where_there_is_room() -> None:
    table = cost_problem(asked()).table
    found = OffloadFrontier(table, 2**30)
    room = found.most_bytes + found.output_bytes
    for budget in (room, 2 * room, None):
        assert replay(found.schedule(budget), table).host_bytes == 0


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
    assert len(Chain.of(EvoformerStack(TINY)).steps) == 18
