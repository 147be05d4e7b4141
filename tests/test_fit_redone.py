"""Blocks that autograd itself runs again: torch's gradients in every loop, its memory and its work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from evoplan.cost_model import measure
from evoplan.model.running.internals import other_forwards
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.unchanged import ChangedError
from evoplan.planner.fitting.patched import Patched
from evoplan.planner.schedules.schedule import Run, Sequence
from tests.test_fit import assert_same, chain_of, step
from tests.test_fit_loops import Counts, Draws, LowRank, Remembers, Scales, gradients, odd
from tests.zoo import GPT, Block, Case, case, random

REDO, LEAN = Strategy.parse("whole[.=redo]"), Strategy.parse("lean")
Loop = Callable[[nn.Module, Case], dict[str, Tensor]]


def redone(given: Case, model: nn.Module | None = None) -> Patched:
    """The model, its blocks run again by autograd but for the last, which is lean."""
    chain = chain_of(given)
    runs = [Run(call.index, REDO) for call in chain.calls[:-1]]
    schedule = Sequence((*runs, Run(len(runs), LEAN)))
    patched = Patched(given.model if model is None else model, chain, schedule)
    patched.install()
    return patched


def same(loop: Loop, given: Case) -> None:
    """What a loop finds with the plan is what it finds without, the second time as the first."""
    expected, once_more = (loop(copy.deepcopy(given.model), given) for _ in range(2))
    model = copy.deepcopy(given.model)
    redone(given, model)
    before = copy.deepcopy(model.state_dict())
    assert_same(expected, loop(model, given))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in before and tensor.shape == before[name].shape:
                tensor.copy_(before[name])
    model.zero_grad()
    assert_same(once_more, loop(model, given))


def loss_of(model: nn.Module, given: Case) -> Tensor:
    out = model(*given.args, **given.kwargs)
    return sum((t.square().mean() for t in (out if isinstance(out, tuple) else (out,))), torch.zeros(()))


def accumulated(model: nn.Module, given: Case) -> dict[str, Tensor]:
    torch.manual_seed(5)
    for _ in range(3):
        loss_of(model, given).backward()
    return gradients(model)


def asked_for(model: nn.Module, given: Case) -> dict[str, Tensor]:
    """torch.autograd.grad, which adds nothing up, and leaves `.grad` alone."""
    torch.manual_seed(5)
    loss, parameters = loss_of(model, given), list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    some = torch.autograd.grad(loss, parameters[5:9])
    assert all(parameter.grad is None for parameter in parameters)
    return {str(at): grad for at, grad in enumerate((*found, *some))}


def chosen(model: nn.Module, given: Case) -> dict[str, Tensor]:
    torch.manual_seed(5)
    loss, parameters = loss_of(model, given), list(model.parameters())
    loss.backward(inputs=parameters[3:6], retain_graph=True)
    loss.backward(inputs=parameters[4:9])
    return gradients(model)


def twice(model: nn.Module, given: Case) -> dict[str, Tensor]:
    torch.manual_seed(5)
    loss = loss_of(model, given)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


def two_forwards(model: nn.Module, given: Case) -> dict[str, Tensor]:
    torch.manual_seed(5)
    one, other = loss_of(model, given), loss_of(model, given)
    (one * other).backward()
    return gradients(model)


def of_a_gradient(model: nn.Module, given: Case) -> dict[str, Tensor]:
    torch.manual_seed(5)
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss_of(model, given), parameters, create_graph=True)
    sum(grad.square().sum() for grad in found).backward()  # type: ignore[union-attr]
    return gradients(model)


def frozen_in_between(model: nn.Module, given: Case) -> dict[str, Tensor]:
    torch.manual_seed(5)
    loss = loss_of(model, given)
    list(model.children())[1].requires_grad_(False)
    loss.backward()
    return gradients(model)


def adapted(model: nn.Module, given: Case) -> dict[str, Tensor]:
    for block in model.blocks:
        if not isinstance(block.mlp.up, LowRank):
            block.mlp.up = LowRank(block.mlp.up)
    return step(given, model)


def replaced(model: nn.Module, given: Case) -> dict[str, Tensor]:
    """Other weights for one call, whose gradients are found when they are gone."""
    torch.manual_seed(2)
    weights = {
        n: (p.detach() + 0.01 * torch.randn_like(p)).requires_grad_() for n, p in model.named_parameters()
    }
    torch.manual_seed(3)
    out = torch.func.functional_call(model, weights, given.args)
    out.square().mean().backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def hooked(model: nn.Module, given: Case) -> dict[str, Tensor]:
    """Hooks on parameters see a gradient once and whole; those on modules, what they see without a plan."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*about: Any) -> None:
            tensor = about[-1] if isinstance(about[-1], Tensor) else about[-1][0]
            times = sum(other.startswith(name) for other in seen)
            grad = tensor.grad if isinstance(tensor, nn.Parameter) else tensor
            seen[f"{name}, {times}"] = grad.detach().clone()

        return hook

    block = model.blocks[1]
    handles = [
        block.mlp.up.weight.register_hook(lambda grad: grad * 5),
        block.mlp.up.weight.register_post_accumulate_grad_hook(note("added up")),
        block.mlp.down.bias.register_hook(note("bias")),
        block.register_full_backward_hook(note("backward")),
        block.register_forward_hook(note("forward")),
        model.blocks[2].mlp.register_forward_hook(lambda module, args, out: out * 1.5),
    ]
    found = step(given, model)
    for handle in handles:
        handle.remove()
    return found | seen


LOOPS = [accumulated, asked_for, chosen, twice, two_forwards, of_a_gradient, frozen_in_between, adapted,
         replaced, hooked]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops(loop: Loop) -> None:
    same(loop, case("gpt"))


@pytest.mark.parametrize("loop", [accumulated, twice, two_forwards], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("name", ["pairs", "skips", "recycled", "decoder", "sequential"])
def test_other_wirings(name: str, loop: Loop) -> None:
    same(loop, case(name))


@pytest.mark.parametrize("trained", ["blocks.2", "blocks.4", "head", "blocks.1.mlp.up.bias"])
def test_frozen_parameters(trained: str) -> None:
    given = case("gpt")
    for name, parameter in given.model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    same(accumulated, given)


@pytest.mark.parametrize("loop", [accumulated, asked_for, twice, hooked], ids=lambda loop: loop.__name__)
def test_shared_parameters(loop: Loop) -> None:
    """Of two blocks, and of a block and what is outside of the stack."""
    given = case("gpt")
    model = given.model
    model.blocks[3].mlp = model.blocks[1].mlp
    model.blocks[2].attention.out.weight = model.blocks[0].attention.out.weight
    model.head.bias = nn.Parameter(model.head.bias.detach())
    model.blocks[0].norm1.weight = model.blocks[4].norm2.weight
    same(loop, given)


def test_data_parallel(tmp_path: Path) -> None:
    """Its hooks see every gradient once, in one process as in many."""

    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        parallel = DistributedDataParallel(model)
        with parallel.no_sync():
            step(given, parallel)
        for _ in range(2):
            loss_of(parallel, given).backward()
        return gradients(model)

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        given = case("gpt")
        expected = loop(copy.deepcopy(given.model), given)
        redone(given)
        assert_same(expected, loop(given.model, given))
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_that_steps_as_gradients_come() -> None:
    """Each block runs again before its own parameters move."""

    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        torch.manual_seed(5)

        def descend(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(descend) for p in model.parameters()]
        for _ in range(2):
            loss_of(model, given).backward()
        for handle in handles:
            handle.remove()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    same(loop, case("gpt"))


def by_hand(given: Case) -> Any:
    """torch.utils.checkpoint around every block but the last."""

    def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        about = {"use_reentrant": False, "preserve_rng_state": False}
        return lambda *args, **kwargs: checkpoint(forward, *args, **about, **kwargs)

    return other_forwards({block: checkpointed(block.forward) for block in given.model.blocks[:-1]})


def test_memory_and_work_are_those_of_a_checkpoint_by_hand() -> None:
    """Gradients are added up as they come, and the last product of a block is not made again."""
    given = case("gpt")._replace(model=GPT(dropout=0.0).train(), args=(torch.randint(50, (3, 41)),))
    for parameter in given.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    blocks = [REDO] * 4 + [Strategy.parse("whole")] * 2  # a norm is the last
    plan = Patched(given.model, chain_of(given), Sequence(tuple(map(Run, range(6), blocks))))

    def one() -> None:
        given.model(*given.args).square().mean().backward()

    def found() -> tuple[int, int]:
        one()  # the first time a block that runs again is seen to do the same
        with FlopCounterMode(display=False) as counter:
            one()
        return measure.peak_bytes(one), counter.get_total_flops()

    with by_hand(given):
        peak, work = found()
    plan.install()
    assert found() == (peak, work)


def test_weights_and_arguments_that_change_before_backward_are_an_error() -> None:
    given = case("gpt")
    redone(given)
    loss = loss_of(given.model, given)
    with torch.no_grad():
        given.model.blocks[0].mlp.up.weight.mul_(2)
    with pytest.raises(ChangedError, match=r"mlp.up.weight of blocks\.0 was changed in place"):
        loss.backward()
    given = case("pairs")
    redone(given)
    loss = loss_of(given.model, given)
    given.kwargs["mask"].zero_()
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


def test_after_such_an_error_the_model_is_as_it_was() -> None:
    given = case("gpt")
    expected = step(given, copy.deepcopy(given.model))
    redone(given)
    loss = loss_of(given.model, given)
    weight = given.model.blocks[2].mlp.up.weight
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(ChangedError):
        loss.backward()
    with torch.no_grad():
        weight.div_(2)
    assert_same(expected, step(given))


def test_modes_counters_and_settings_are_what_they_were_in_forward() -> None:
    def modes(model: nn.Module, given: Case) -> dict[str, Tensor]:
        torch.manual_seed(1)
        one = model(*given.args)
        model.eval()
        for block in model.blocks:
            block.scale = 2.0
        (one * model(*given.args)).square().mean().backward()
        assert not model.training
        model.train()
        for block in model.blocks:
            block.scale = 1.0
        return gradients(model)

    same(modes, odd(Scales))
    given = odd(Counts)
    expected = [step(given, model) for model in [copy.deepcopy(given.model)] for _ in range(2)]
    redone(given)
    for found in expected:
        assert_same(found, step(given))


def test_settings_are_what_they_were_in_forward() -> None:
    class Setting(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if torch.get_default_dtype() == torch.float64 else 3)

    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        torch.set_default_dtype(torch.float64)
        try:
            loss = loss_of(model, given)
        finally:
            torch.set_default_dtype(torch.float32)
        loss.backward()
        return gradients(model)

    same(loop, odd(Setting))


def test_precision_is_what_it_was_in_forward() -> None:
    """Also where a cast of a parameter that a block uses was made before it, and kept."""

    class Tied(GPT):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.words(tokens)
            x = x + self.blocks[1].mlp.down(self.blocks[1].mlp.up(x))
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    torch.manual_seed(0)
    given = case("gpt", torch.float32)._replace(model=Tied(dropout=0.0).train())

    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*given.args).float().square().mean()
        loss.backward()
        return gradients(model)

    expected = loop(copy.deepcopy(given.model), given)
    redone(given)
    assert_same(expected, loop(given.model, given), 1e-2)


def test_what_would_do_otherwise_when_it_runs_again_is_an_error() -> None:
    for kind, says in ((Draws, "default generator"), (Remembers, "does not do the same when it runs again")):
        given = odd(kind)
        redone(given)
        for block in given.model.blocks:
            block.draws = True
        with pytest.raises((ValueError, RuntimeError), match=says):
            step(given)


def test_dropout_that_is_turned_on_after_the_plan_was_made_is_an_error() -> None:
    given = Case(GPT(dropout=0.0).double().train(), case("gpt").args)
    redone(given)
    given.model.blocks[1].dropout.p = 0.5
    with pytest.raises(ValueError, match=r"blocks\.1 draws random numbers, as it did not"):
        step(given)


def test_buffers_that_others_write_into_in_between_are_an_error() -> None:
    class Shifted(Block):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_buffer("shift", random(width))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.shift)

    given = odd(Shifted)
    redone(given)
    loss = given.model(*given.args).square().mean()
    given.model.blocks[1].shift.add_(1)
    with pytest.raises(ChangedError, match=r"shift of blocks\.1 was changed in place"):
        loss.backward()
