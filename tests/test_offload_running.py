"""Steps of which something waits in host memory: no gradient other than without, whenever copies are made."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from evoplan.cost_model import measure
from evoplan.model import EvoformerStack
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.execution.host import Host, Waiting
from evoplan.planner.schedules.offload import last_read
from evoplan.planner.schedules.schedule import RECORD, Run, Sequence
from tests.conftest import TINY, random_inputs, random_schedule_of, randomise
from tests.offload import with_waits

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
    storages: list[tuple[torch.UntypedStorage, int]] = []
    for block in stack.blocks:
        for name, layer in list(block.named_modules()):
            if name.endswith("linear_q"):
                owner, _, last = name.rpartition(".")
                setattr(block.get_submodule(owner), last, Seeing(layer))
            elif name.endswith(("linear_a", "linear_b")):
                layer.register_forward_hook(
                    lambda module, args, result: storages.append((result.untyped_storage(), result.nbytes))
                )
            elif isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda module, args, result: seen.extend((*args, result)))
    inputs = random_inputs(TINY)
    expected = loss_and_gradients(stack, stack, inputs)
    whole = Sequence(tuple(Run(step, WHOLE) for step in range(18)))
    planned = PlannedModule(
        stack, with_waits(whole, PlannedModule(stack, whole).liveness, random.Random(0), 1.0)
    )
    seen.clear()
    storages.clear()
    loss = mean_square(*planned(**inputs, dropout_seed=3))
    kept = [tensor for layer in stack.modules() if isinstance(layer, Seeing) for tensor in layer.seen]
    for tensor in (*stack.buffers(), *kept, *seen):
        assert tensor.untyped_storage().nbytes() >= tensor.nbytes
    assert storages
    assert all(storage.nbytes() == nbytes for storage, nbytes in storages)
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
