"""Loops that people write around a model that `evoplan.fit` has changed: its gradients, or one clear line."""

from __future__ import annotations

import copy
import io
import pickle
import random as python_random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import evoplan
from evoplan.model.foreign.leaves import ChangedCallError
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.unchanged import ChangedError
from evoplan.planner.fitting.fitted import Fitted
from evoplan.planner.fitting.patched import Patched
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from tests.test_fit import assert_same, chain_of, step
from tests.zoo import GPT, MLP, Block, Case, case, random

Loop = Callable[[nn.Module, Case], dict[str, Tensor]]


@contextmanager
def fitted(given: Case, share: float = 0.3, **options: Any) -> Iterator[Fitted]:
    """The case's model within a budget that makes it recompute most blocks."""
    under = given.fit(**options)
    least, most = under.plan.least_feasible_bytes, under.plan.predicted.peak_bytes
    under.replan(int(least + share * (most - least)))
    try:
        yield under
    finally:
        under.remove()


def both(loop: Loop, name: str = "gpt", **options: Any) -> None:
    """What a loop finds with the plan is what it finds without."""
    given = case(name)
    expected = loop(copy.deepcopy(given.model), given)
    with fitted(given, **options):
        assert_same(expected, loop(given.model, given))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_model_stays_itself() -> None:
    given = case("cnn")
    names, kind = list(given.model.state_dict()), type(given.model)
    before = {name: set(module.__dict__) for name, module in given.model.named_modules()}
    with fitted(given) as under:
        assert under.model is given.model
        assert type(given.model) is kind
        assert list(given.model.state_dict()) == names
        assert under(*given.args).equal(given.model(*given.args))
    assert {name: set(module.__dict__) for name, module in given.model.named_modules()} == before


@pytest.mark.parametrize("name", ["gpt", "cnn"])
def test_copies_and_pickles_are_unplanned_models_of_their_own(name: str) -> None:
    given = case(name)
    plain = copy.deepcopy(given.model)
    with fitted(given):
        stored = io.BytesIO()
        torch.save(given.model, stored)
        stored.seek(0)
        others = [
            copy.deepcopy(given.model),
            pickle.loads(pickle.dumps(given.model)),
            torch.load(stored, weights_only=False),
        ]
        for other in others:
            for mine, theirs in zip(given.model.parameters(), other.parameters(), strict=True):
                assert mine is not theirs
            assert_same(step(given, copy.deepcopy(plain)), step(given, other))


def test_accumulation_and_an_optimizer() -> None:
    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                model(*given.args).square().mean().backward()
            optimizer.step()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    both(loop)
    both(loop, "sequential")


def test_several_backwards_and_chosen_gradients() -> None:
    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        torch.manual_seed(5)
        s, z = model(*given.args, **given.kwargs)
        loss = s.square().mean() + z.square().mean()
        weight = next(model.parameters())
        first = torch.autograd.grad(loss, [weight, given.args[1]], retain_graph=True)
        alone = torch.autograd.grad(s.sum(), given.args[0], retain_graph=True)
        last = torch.autograd.grad(loss, [weight, given.args[1]])
        return dict(zip("abcde", (*first, *alone, *last), strict=True))

    both(loop, "pairs")
    both(loop, "pairs", share=0.9)


def test_eval_no_grad_and_parts_of_the_model_run_as_written() -> None:
    given = case("gpt")
    plain = copy.deepcopy(given.model)
    with fitted(given):
        model = given.model.eval()
        with torch.no_grad():
            assert model(*given.args).equal(plain.eval()(*given.args))
            assert model(given.args[0][:1]).shape[0] == 1
        with torch.inference_mode():
            assert model(*given.args).equal(plain(*given.args))
        x = random(2, 5, 32)
        assert model.blocks[1](x).equal(plain.blocks[1](x))
        model.train()
        assert_same(step(given, plain.train()), step(given))


def test_two_passes_before_a_backward_and_two_models() -> None:
    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        torch.manual_seed(5)
        one, other = model(*given.args), model(given.args[0].flip(0))
        (one * other).square().mean().backward()
        return gradients(model)

    both(loop)
    first, second = case("gpt"), case("gpt")
    expected = [step(c, copy.deepcopy(c.model)) for c in (first, second)]
    with fitted(first), fitted(second, share=0.6):
        assert_same(expected[0], step(first))
        assert_same(expected[1], step(second))


@pytest.mark.parametrize("trained", ["none of the first block", "the last block alone", "none of the stack"])
def test_frozen_parts(trained: str) -> None:
    given = case("gpt")
    for name, parameter in given.model.named_parameters():
        frozen = {
            "none of the first block": name.startswith(("words", "places", "blocks.0")),
            "the last block alone": not name.startswith("blocks.4"),
            "none of the stack": not name.startswith("head"),
        }[trained]
        parameter.requires_grad_(not frozen)
    expected = step(given, copy.deepcopy(given.model))
    with fitted(given) as under:
        assert_same(expected, step(given))
        assert under.verify(given.args).ok


def test_parts_that_are_frozen_after_the_plan_was_made() -> None:
    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        model.blocks[1].requires_grad_(False)
        found = step(given, model)
        model.blocks[1].requires_grad_(True)
        return found

    both(loop)


class LowRank(nn.Module):
    """A linear layer with an adapter beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.layer = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)
        self.to(layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


def test_adapters_and_other_weights() -> None:
    def adapted(model: nn.Module, given: Case) -> dict[str, Tensor]:
        for block in model.blocks:
            block.mlp.up = LowRank(block.mlp.up)
        return step(given, model)

    def replaced(model: nn.Module, given: Case) -> dict[str, Tensor]:
        torch.manual_seed(2)
        weights = {
            name: (p + 0.01 * torch.randn_like(p)).requires_grad_() for name, p in model.named_parameters()
        }
        torch.manual_seed(3)
        out = torch.func.functional_call(model, {n: w.detach().requires_grad_() for n, w in weights.items()},
                                         given.args)  # fmt: skip
        out.square().mean().backward()
        model.load_state_dict(weights, assign=True)
        return step(given, model)

    both(adapted)
    both(replaced)


def test_weights_that_change_before_backward_are_an_error_as_in_torch() -> None:
    given = case("gpt")
    with fitted(given, 0.0):
        loss = given.model(*given.args).square().mean()
        with torch.no_grad():
            given.model.blocks[0].mlp.up.weight.mul_(2)
        with pytest.raises(ChangedError, match=r"mlp.up.weight of blocks\.0 was changed in place"):
            loss.backward()


def test_weights_of_modules_that_run_again_may_not_change_before() -> None:
    """Autograd has not saved them, and would not see it."""
    given = case("gpt")
    again = Strategy(WHOLE.kind, within=(("mlp", "redo"),))
    runs = *(Run(at, again) for at in range(5)), Run(5, WHOLE)  # a norm is the last
    Patched(given.model, chain_of(given), Sequence(runs)).install()
    loss = given.model(*given.args).square().mean()
    with torch.no_grad():
        given.model.blocks[0].mlp.up.weight.mul_(2)
    with pytest.raises(ChangedError, match=r"mlp.up.weight of blocks\.0 was changed in place"):
        loss.backward()


def test_inputs_that_change_before_backward_are_an_error() -> None:
    """By evoplan where a block runs again, by autograd where it does not."""
    given = case("pairs")
    with fitted(given, 0.0):
        loss = given.model(*given.args, **given.kwargs)[0].square().mean()
        given.kwargs["mask"].zero_()
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            loss.backward()


def test_hooks_see_every_call_and_may_change_results() -> None:
    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        handles = [
            model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out.detach().mean())),
            model.blocks[1].mlp.register_forward_hook(lambda m, args, out: out * 1.5),
            model.blocks[2].register_full_backward_hook(lambda m, gi, go: seen.append(go[0].mean())),
        ]
        found = step(given, model)
        for handle in handles:
            handle.remove()
        return found | {f"seen {at}": value for at, value in enumerate(seen)}

    both(loop)


def test_a_hook_on_a_block_that_changes_what_the_next_is_given() -> None:
    """Hung on before, it is part of the plan; hung on afterwards, the next block is given another tensor."""
    given = case("gpt")
    given.model.blocks[1].register_forward_hook(lambda m, args, out: out * 1.5)
    expected = step(given, copy.deepcopy(given.model))
    with fitted(given):
        assert_same(expected, step(given))
        given.model.blocks[2].register_forward_hook(lambda m, args, out: out * 1.5)
        with pytest.raises(evoplan.ChangedCallError, match=r"blocks\.3 is given another tensor"):
            step(given)


def shorter(given: Case) -> Case:
    return given._replace(args=(given.args[0][:2],))


def without_a_block(given: Case) -> Case:
    blocks = given.model.blocks
    given.model.blocks = nn.ModuleList([blocks[0], blocks[1], *blocks[3:]])
    return given


def with_blocks_swapped(given: Case) -> Case:
    blocks = given.model.blocks
    given.model.blocks = nn.ModuleList([blocks[0], blocks[2], blocks[1], *blocks[3:]])
    return given


def with_another_block(given: Case) -> Case:
    torch.manual_seed(7)
    given.model.blocks[2] = Block(32).double()
    return given


@pytest.mark.parametrize("change", [shorter, without_a_block, with_blocks_swapped, with_another_block])
def test_calls_that_differ_are_told_or_run_unplanned(change: Callable[[Case], Case]) -> None:
    given = case("gpt")
    with fitted(given):
        other = change(given)
        with pytest.raises(evoplan.ChangedCallError, match="fit the model again"):
            step(other)
    expected = change(case("gpt"))
    given = case("gpt")
    with fitted(given, on_change="unplanned"):
        assert_same(step(expected), step(change(given)))


def test_an_error_inside_of_a_forward_leaves_nothing_behind() -> None:
    given = case("gpt")
    expected = step(given, copy.deepcopy(given.model))
    with fitted(given):
        broken = given.model.blocks[2].mlp.register_forward_hook(lambda m, args, out: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(given)
        broken.remove()
        assert_same(expected, step(given))


def test_autocast() -> None:
    """In forward only; products in bfloat16; gradients equal to the plain model's under the same."""
    given = case("gpt", torch.float32)

    def loop(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*given.args).float().square().mean()
        loss.backward()
        return gradients(model)

    expected = loop(copy.deepcopy(given.model))
    free = given.fit(autocast=torch.bfloat16)
    least, most = free.plan.least_feasible_bytes, free.plan.predicted.peak_bytes
    free.remove()
    for budget in (least, (least + most) // 2, most):
        with torch.autocast("cpu", torch.bfloat16):
            under = given.fit(budget)
        assert under.plan.precision == "bfloat16 mixed"
        assert_same(expected, loop(given.model), 1e-2)
        found = under.verify(given.args)
        assert found.measured_peak_bytes <= budget
        assert found.ok, found
        under.remove()


def test_what_a_model_does_in_place_between_its_blocks() -> None:
    class InPlace(GPT):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.words(tokens)
            for block in self.blocks:
                x = block(x)
                x *= 0.9
                x.relu_()
            return self.head(x)

    torch.manual_seed(0)
    given = case("gpt")._replace(model=InPlace().double())
    expected = step(given, copy.deepcopy(given.model))
    with fitted(given) as under:
        assert_same(expected, step(given))
        assert under.verify(given.args).ok


def test_a_block_that_writes_into_its_argument_is_refused() -> None:
    class Writes(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    model = nn.Sequential(nn.Linear(8, 16), *(Writes(16) for _ in range(3)))
    with pytest.raises(evoplan.CaptureError, match=r"1 writes into what it is given, in place"):
        evoplan.fit(model, (torch.ones(2, 3, 8),))


class Odd(nn.Module):
    """A stack of blocks of some kind."""

    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind(16) for _ in range(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def odd(kind: type[Block]) -> Case:
    return Case(Odd(kind).train(), (random(2, 6, 16).requires_grad_(),))


class Counts(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Scales(Block):
    scale = 1.0

    def __init__(self, width: int) -> None:
        super().__init__(width, dropout=0.2)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_what_modules_are_is_what_they_were_in_forward() -> None:
    """The mode and plain attributes, of two forwards before one backward; a count of calls."""

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

    for given, loop in ((odd(Scales), modes), (odd(Counts), lambda model, given: step(given, model))):
        expected = loop(copy.deepcopy(given.model), given)
        with fitted(given, share=0.0):
            assert_same(expected, loop(given.model, given))


class Scaled(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("scale", torch.full((width,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


@pytest.mark.filterwarnings("error:.*not run in slices")
def test_slices_go_on_after_the_plan_was_verified_and_a_snapshot_read() -> None:
    given = Case(Odd(Scaled).double(), (random(4, 64, 16).requires_grad_(),))
    expected = step(given, copy.deepcopy(given.model))
    with fitted(given, share=0.0) as under:
        assert "chunk" in str(under.plan.to_json()["schedule"])
        assert under.verify(given.args).ok
        given.model.load_state_dict(copy.deepcopy(given.model.state_dict()))
        assert_same(expected, step(given))


class Switched(Block):
    """Adapters as peft has them: which is in use says an attribute whose name begins with `_`."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.adapters = nn.ModuleDict({name: nn.Linear(width, width) for name in "ab"})
        self._active: Any = "a"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(torch.tanh(self.adapters[name](x)) for name in self._active)


@pytest.mark.parametrize("other", ["b", ["a", "b"], ["b"]])
def test_adapters_switched_between_two_forwards_are_what_they_were_in_each(other: Any) -> None:
    def switch(model: nn.Module, name: Any) -> None:
        for block in model.blocks:
            block._active = name

    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        model.zero_grad()
        one = model(*given.args)
        switch(model, other)
        (one * model(*given.args)).square().mean().backward()
        assert all(block._active is other for block in model.blocks)
        switch(model, "a")
        return gradients(model)

    given = odd(Switched)
    expected = loop(copy.deepcopy(given.model), given)
    for share in (0.0, 0.5):
        with fitted(given, share=share):
            assert_same(expected, loop(given.model, given))


class Draws(Block):
    draws = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (float(np.random.rand()) if self.draws else 1.0)


class Remembers(Block):
    """Does something else each time, in a way that nobody can see from outside."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1.0)
        return super().forward(x) * len(self.seen)


@pytest.mark.parametrize(
    ("kind", "says"), [(Draws, "default generator"), (Remembers, "does not do the same when it runs again")]
)
def test_what_would_do_otherwise_when_it_runs_again_is_an_error(kind: type[Block], says: str) -> None:
    given = odd(kind)
    chain = chain_of(given)
    whole = Checkpoint(Sequence(tuple(Run(at, WHOLE) for at in range(4))), (WHOLE,) * 4)
    Patched(given.model, chain, Sequence((whole,))).install()
    for block in given.model.blocks:
        block.draws = True
    with pytest.raises((ValueError, RuntimeError), match=says):
        step(given)


class DrawsItsWay(Block):
    """How often and of how much, by generators that are not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(python_random.randint(0, 2)):
            x = torch.tanh(x) * float(np.random.rand())
        y = super().forward(x[:, int(np.random.randint(3)) :])
        return x + self.drawn(y).mean(1, keepdim=True)

    def drawn(self, x: Tensor) -> Tensor:
        return x.sin() if python_random.random() < 0.5 else x


class InAModule(DrawsItsWay):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.inner = DrawsItsWay(width)

    def drawn(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x).sin()).exp()


@pytest.mark.parametrize("kind", [DrawsItsWay, InAModule])
def test_what_other_generators_decide_is_decided_so_again(kind: type[Block]) -> None:
    def seeded(model: nn.Module, seed: int) -> dict[str, Tensor]:
        python_random.seed(seed)
        np.random.seed(seed)
        return step(given, model)

    given = odd(kind)
    expected = [seeded(copy.deepcopy(given.model), seed) for seed in range(4)]
    before = python_random.getstate(), np.random.get_state()[2]
    for share in (0.0, 0.5):
        with fitted(given, share=share) as under:
            assert (python_random.getstate(), np.random.get_state()[2]) == before
            assert "draws from Python's or NumPy's generator" in under.plan.notes[0]
            for seed, found in enumerate(expected):
                assert_same(found, seeded(given.model, seed))
        before = python_random.getstate(), np.random.get_state()[2]


def test_parameters_hooks_run_once() -> None:
    def loop(model: nn.Module, given: Case) -> dict[str, Tensor]:
        handle = model.blocks[1].mlp.up.weight.register_hook(lambda grad: grad * 5)
        found = step(given, model)
        handle.remove()
        return found

    both(loop)
    both(loop, share=1.0)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    """By a checkpoint over several blocks; blocks in autograd's own graph have one."""
    given = case("pairs")
    chain = chain_of(given)
    runs = tuple(Run(call.index, WHOLE) for call in chain.calls)
    whole = Checkpoint(Sequence(runs), (WHOLE,) * len(runs))
    Patched(given.model, chain, Sequence((whole,))).install()
    s, _ = given.model(*given.args, **given.kwargs)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(s.sum(), given.args[0], create_graph=True)


def test_losses_that_do_not_reach_each_other() -> None:
    """The late one first; else the early one drops checkpoints that it comes past, and the late one says so.

    Blocks of which nothing runs again are autograd's own, which goes any way.
    """

    class Local(Odd):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second, third, fourth = self.blocks
            x = second(first(x))
            return x, fourth(third(x.detach()))

    torch.manual_seed(0)
    given = odd(Block)._replace(model=Local(Block).train())

    def losses(model: nn.Module, early_first: bool = False) -> dict[str, Tensor]:
        early, late = (out.square().mean() for out in model(*given.args))
        if early_first:
            early.backward()
            late.backward()
        else:
            late.backward()
            early.backward()
        return gradients(model)

    expected = losses(copy.deepcopy(given.model))
    chain = chain_of(given)
    runs = tuple(Run(at, WHOLE) for at in range(4))
    model = copy.deepcopy(given.model)
    Patched(model, chain, Sequence(runs)).install()
    assert_same(expected, losses(model))
    model.zero_grad()
    assert_same(expected, losses(model, early_first=True))
    model = copy.deepcopy(given.model)
    both = (Checkpoint(Sequence(half), (WHOLE,) * 2) for half in (runs[:2], runs[2:]))
    Patched(model, chain, Sequence(tuple(both))).install()
    assert_same(expected, losses(model))
    with pytest.raises(RuntimeError, match="came past it from a loss of earlier steps"):
        losses(model, early_first=True)


def test_blocks_of_which_nothing_runs_again_are_autograds_own() -> None:
    """No node of a tape, no node per block: the graph is the plain model's, and so are hooks in it."""
    given = case("gpt")
    seen: list[Tensor] = []
    under = given.fit()
    given.model.blocks[1].mlp.register_forward_hook(lambda module, args, made: seen.append(made))
    loss = under(*given.args).square().mean()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (grad,) = torch.autograd.grad(loss, seen, retain_graph=True)  # it is part of the graph
    assert float(grad.abs().max()) > 0
    names, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node.name() not in names:
            names.add(node.name())
            todo += [inner for inner, _ in node.next_functions]
    assert not [name for name in names if "Step" in name]
    under.remove()


def test_one_plan_at_a_time() -> None:
    given = case("gpt")
    with fitted(given), pytest.raises(evoplan.CaptureError, match="under a plan already"):
        given.fit()


def test_a_models_own_checkpoints_are_to_be_turned_off() -> None:
    class Checkpointed(Odd):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return x

    with pytest.raises(evoplan.CaptureError, match="turn the model's own checkpointing off"):
        odd(Block)._replace(model=Checkpointed(Block)).fit()


def test_a_block_that_returns_a_tensor_twice_and_numbers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Returns(16) for _ in range(4))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            total = x
            for block in self.blocks:
                x, same, places, number = block(x)
                total = total + same * number + places.sum()
            return total

    class Returns(Block):
        def forward(self, x: Tensor) -> tuple[Any, ...]:
            y = super().forward(x)
            return y, y, y.argmax(-1), 0.5

    torch.manual_seed(0)
    given = Case(Twice().train(), (random(2, 6, 16).requires_grad_(),))
    expected = step(given, copy.deepcopy(given.model))
    with fitted(given, share=0.0):
        assert_same(expected, step(given))


def test_compiled_around() -> None:
    given = case("gpt", torch.float32)._replace(model=GPT(dropout=0.0).train())
    expected = step(given, copy.deepcopy(given.model))
    with fitted(given):
        compiled = torch.compile(given.model, backend="eager")
        got = {name.removeprefix("_orig_mod."): t for name, t in step(given, compiled).items()}
        assert_same(expected, got, 1e-5)


class Forces(nn.Module):
    """Of an energy, which blocks make of where things are; or each block's own."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.blocks, self.each = nn.ModuleList(Descends(each) for _ in range(4)), each

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = x
        for block in self.blocks:
            y = block(y)
        return y if self.each else torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]


class Descends(Block):
    def __init__(self, along: bool) -> None:
        super().__init__(8)
        self.along = along

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x - torch.autograd.grad(y.square().sum(), x, create_graph=True)[0] if self.along else y


@pytest.mark.parametrize("each", [False, True])
def test_models_that_differentiate_their_blocks_are_refused(each: bool) -> None:
    given = Case(Forces(each).double(), (random(2, 5, 8),))
    with pytest.raises(evoplan.CaptureError, match=r"blocks.0 is differentiated before .* are over"):
        given.fit()


class Perturbed(nn.Module):
    """By a gradient of its own, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(self.run(x).square().sum(), x)
        return self.run(x.detach() + 0.1 * found.sign())


def test_models_may_find_gradients_that_have_no_graph() -> None:
    given = Case(Perturbed().double(), (random(2, 5, 8),))
    expected = step(given, copy.deepcopy(given.model))
    for share in (0.0, 0.5):
        with fitted(given, share=share):
            assert_same(expected, step(given))


def test_losses_may_differentiate_what_blocks_have_made() -> None:
    def loss(y: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(y.pow(3).sum(), y, create_graph=True)
        return found.square().sum()

    blocks = nn.Sequential(*(Block(8) for _ in range(3))).double()
    given = Case(blocks, (random(2, 5, 8),), loss=loss)
    expected = step(given, copy.deepcopy(blocks))
    with fitted(given, share=0):
        assert_same(expected, step(given))


def test_torch_func_around_a_fitted_model_is_refused_or_unplanned() -> None:
    model, x = nn.Sequential(*(Block(8) for _ in range(3))).double(), random(2, 5, 8)
    calls = {
        "grad": lambda: torch.func.grad(lambda y: model(y).square().sum())(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,))[1],
        "vmap": lambda: torch.func.vmap(model)(x[None].expand(2, -1, -1, -1)),
    }

    def forward_mode() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent

    calls["forward mode"] = forward_mode
    expected = {name: call().detach() for name, call in calls.items()}
    given = Case(model, (x,))
    with fitted(given, share=0):
        for call in calls.values():
            with pytest.raises(ChangedCallError, match="a plan is for forward and backward"):
                call()
    with fitted(given, share=0, on_change="unplanned"):
        assert_same(expected, {name: call().detach() for name, call in calls.items()})
    y = x.clone().requires_grad_()
    with fitted(given, share=0), pytest.raises(RuntimeError, match="found one at a time"):
        torch.autograd.grad(model(y), y, torch.ones(2, *y.shape), is_grads_batched=True)


class Answers(nn.Module):
    """Blocks that return something else, and what takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            made = block(x)
            if isinstance(made, dict | tuple):
                made = sum(made.values() if isinstance(made, dict) else made)
            x = x * 2 if made is None else x + made[:, :1]
        return x


class Counting(Block):
    answer: Any = staticmethod(lambda y: y)

    def __init__(self, width: int) -> None:
        super().__init__(width, dropout=0.2)
        self.norm1, self.calls = nn.BatchNorm1d(5), 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.answer(super().forward(x))


ANSWERS = [lambda y: (y,), lambda y: {"b": y}, lambda y: None, lambda y: (y, y * 2), lambda y: y[:, :3]]


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("answer", ANSWERS)
def test_blocks_that_return_something_else_run_as_written(answer: Callable[[Tensor], Any], at: int) -> None:
    def alone(strategy: Strategy) -> Sequence:
        return Sequence(tuple(Run(step, strategy) for step in range(4)))

    torch.manual_seed(0)
    given = Case(Answers().double(), (random(2, 5, 8).requires_grad_(),))
    chain = chain_of(given)
    changed = copy.deepcopy(given.model)
    changed.blocks[at].answer = answer
    expected = step(given, copy.deepcopy(changed))
    over_all = Sequence((Checkpoint(alone(WHOLE), (WHOLE,) * 4),))
    later = Checkpoint(Sequence((Run(2, WHOLE), Run(3, WHOLE))), (WHOLE,) * 2)
    inside = alone(Strategy("whole", within=(("mlp", "redo"),)))
    for schedule in (over_all, Sequence((Run(0, WHOLE), Run(1, WHOLE), later)), inside, alone(WHOLE)):
        model = copy.deepcopy(changed)
        Patched(model, chain, schedule, "unplanned").install()
        assert_same(expected, step(given, model))
        assert [block.calls for block in model.blocks] == [1] * 4
    model = copy.deepcopy(changed)
    Patched(model, chain, over_all).install()
    with pytest.raises(ChangedCallError, match=f"blocks.{at} returns something else.*fit the model again"):
        step(given, model)


class Meeting(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.mlp = self.Meets(width)

    class Meets(MLP):
        meets: Any = staticmethod(lambda: None)

        def forward(self, x: Tensor) -> Tensor:
            self.meets()
            return super().forward(x)


def test_threads_leave_nothing_in_modules() -> None:
    """One comes later into a module that runs otherwise, and goes later, if it may."""
    given = Case(nn.Sequential(*(Meeting(8) for _ in range(2))).double(), (random(2, 5, 8),))
    model, chain = given.model, chain_of(given)
    within = Strategy("whole", within=(("mlp", "redo"),))
    patched = Patched(model, chain, Sequence(tuple(Run(at, within) for at in range(2))))
    patched.install()
    first, second, gone = threading.Event(), threading.Event(), threading.Event()

    def meet() -> None:
        own, other = (
            (first, second) if threading.current_thread() is threading.main_thread() else (second, gone)
        )
        own.set()
        other.wait(0.3)

    def run() -> None:
        first.wait()
        model(*given.args)

    model[0].mlp.meets, model[1].mlp.meets = meet, gone.set
    thread = threading.Thread(target=run)
    thread.start()
    model(*given.args)
    thread.join()
    patched.remove()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("around", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrizations_that_are_cached(around: str) -> None:
    """What is made anew in a block is the same, unless buffers change: that is told."""

    def loop(model: nn.Module) -> dict[str, Tensor]:
        with parametrize.cached():
            (model(*given.args).square().mean() + model(given.args[0] * 2).square().mean()).backward()
        return gradients(model) | {name: buffer.clone() for name, buffer in model.named_buffers()}

    torch.manual_seed(0)
    model = nn.Sequential(*(Block(8) for _ in range(4))).double()
    for block in model:
        getattr(nn.utils.parametrizations, around)(block.mlp.up)
    given = Case(model, (random(2, 5, 8),))
    expected = loop(copy.deepcopy(model))
    with parametrize.cached():
        under = given.fit()
        assert under.verify(given.args).max_gradient_error < 1e-12
    under.replan(under.plan.least_feasible_bytes)
    if around == "spectral_norm":
        with pytest.raises(ChangedCallError, match="has parametrizations that change buffers"):
            loop(model)
    else:
        assert_same(expected, loop(model))
