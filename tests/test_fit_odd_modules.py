"""Modules in blocks that do otherwise than they look: gradients stay the model's own."""

from __future__ import annotations

import copy
import random as python_random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evoplan.cost_model.fakes import fake_copy, fake_tensors
from evoplan.cost_model.menus import strategies_of
from evoplan.model.foreign.capture import CaptureError
from evoplan.model.foreign.children import SELF
from evoplan.model.foreign.independence import independent_axes
from evoplan.model.foreign.writes import quietly_written
from evoplan.model.running.internals import has_data
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.unchanged import ChangedError
from evoplan.planner.fitting.patched import Patched
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from tests.test_fit import assert_same, chain_of, step
from tests.test_fit_axes import child_of
from tests.zoo import MLP, Case, random


class Block(nn.Module):
    """A child between layers of the block's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.child, self.dropout = nn.LayerNorm(6), self.Child(), nn.Dropout(0.1)
        self.up, self.down = nn.Parameter(random(6, 40)), nn.Parameter(random(40, 6, seed=1))

    class Child(MLP):
        scale = 1.0
        found: Any = None

        def __init__(self) -> None:
            super().__init__(6)
            self.scale, self.calls = 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.within(self.norm(x)) @ self.up) @ self.down

    def within(self, x: Tensor) -> Tensor:
        return self.child(x)


class SetsANumber(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.scale * x)

    def within(self, x: Tensor) -> Tensor:
        self.child.scale = 2.0
        result = self.child(x)
        self.child.scale = 1.0
        return result


class CountsCalls(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(self.calls * x)

    def within(self, x: Tensor) -> Tensor:
        self.child.calls = 0
        return self.child(self.child(x).sin())


class HandsOver(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.found

    def within(self, x: Tensor) -> Tensor:
        self.child.found = x.sigmoid()
        result = self.child(x)
        self.child.found = None
        return result


class LeavesInAnAttribute(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            self.found = self.up(x).square().mean()
            return super().forward(x)

    def within(self, x: Tensor) -> Tensor:
        result = self.child(x)
        found, self.child.found = self.child.found, None
        return result + found


class AddsToAList(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
            found.append(self.up(x).square().mean())
            return super().forward(x)

    def within(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        return self.child(x, found) + sum(found)


class AddsToAnObject(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor, found: Any) -> Tensor:
            found.loss = found.loss + self.up(x).square().mean()
            return super().forward(x)

    def within(self, x: Tensor) -> Tensor:
        found = SimpleNamespace(loss=0.0)  # which has no hash
        return self.child(x, found) + found.loss


class WritesIntoItsArgument(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.relu_())

    def within(self, x: Tensor) -> Tensor:
        return self.child(x * 2)


class DrawsWithPython(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * python_random.uniform(0.5, 2))

    def within(self, x: Tensor) -> Tensor:
        return self.dropout(self.child(x))


TABLE = random(7, 6, seed=2)


class ReadsATable(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * TABLE)


class AsksForGradients(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (2 if x.requires_grad else 1))


class Conjugates(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(torch.complex(x, x.flip(-1)) * 2)
            return super().forward((z * z.conj() * (z.conj() + z)).real)


class GivesOtherParameters(Block):
    def within(self, x: Tensor) -> Tensor:
        others = {name: parameter * 2 for name, parameter in self.child.named_parameters()}
        return torch.func.functional_call(self.child, others, (x,))


class GivesAnArray(Block):
    class Child(Block.Child):
        def forward(self, x: Tensor, scale: Any) -> Tensor:
            return super().forward(x) * float(scale.sum())

    def within(self, x: Tensor) -> Tensor:
        return self.child(x, np.arange(3))


KINDS = [
    SetsANumber, CountsCalls, HandsOver, LeavesInAnAttribute, AddsToAList, AddsToAnObject,
    WritesIntoItsArgument, DrawsWithPython, ReadsATable, AsksForGradients, Conjugates,
    GivesOtherParameters, GivesAnArray,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_every_strategy(kind: type[Block]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(kind() for _ in range(3))).double()
    given = Case(model, (random(3, 7, 6).requires_grad_(),))
    python_random.seed(0)
    expected = step(given, copy.deepcopy(model))
    chain = chain_of(given)
    offered = [strategies_of(call.children) for call in chain.calls]
    assert len(offered) == 3
    for number in range(max(map(len, offered))):
        runs = (Run(at, some[min(number, len(some) - 1)]) for at, some in enumerate(offered))
        planned = copy.deepcopy(model)
        Patched(planned, chain, Sequence(tuple(runs))).install()
        python_random.seed(0)
        assert_same(expected, step(given, planned))
    fitted = given.fit()
    fitted.replan(fitted.plan.least_feasible_bytes)
    python_random.seed(0)
    if kind is not AsksForGradients:  # a run for no backward does otherwise, which is an error
        assert_same(expected, step(given))


def test_blocks_results_may_be_written_into_where_they_were_not_recorded() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(MLP(6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x).relu_()
            return x

    given = Case(Model().double(), (random(3, 23, 6).requires_grad_(),))
    expected = step(given)
    runs = [Run(at, WHOLE) for at in range(4)]
    alone = (Checkpoint(Sequence((run,)), (WHOLE,)) for run in runs)
    Patched(given.model, chain_of(given), Sequence(tuple(alone))).install()
    assert_same(expected, step(given))


class Normalised(nn.Module):
    """A batch normalisation of one's own, which counts no batches: a kernel writes, and no version tells."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
        self.weight, self.bias = nn.Parameter(random(24)), nn.Parameter(random(24, seed=1))
        self.register_buffer("running_mean", random(24, seed=2))
        self.register_buffer("running_var", random(24, seed=3).square())

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        normal = nn.functional.batch_norm(self.up(x), *statistics, self.weight, self.bias, self.training)
        return x + self.down(torch.tanh(normal))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_running_statistics_count_every_batch_once(share: float) -> None:
    model = nn.Sequential(*(Normalised() for _ in range(4))).double()
    given = Case(model, (random(57, 6).requires_grad_(),))
    plain = copy.deepcopy(model)
    expected = [step(given, plain) for _ in range(2)]
    fitted = given.fit()
    assert all(call.changes and call.children[SELF].changes for call in fitted._fitting.captured.calls)
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    fitted.replan(int(least + share * (most - least)))
    for found in expected:
        assert_same(found, step(given))


def test_what_operators_write_into_without_counting_it() -> None:
    x, mean, var = random(57, 6), random(6), random(6).square()
    seen: list[tuple[str, set[int]]] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            quiet = quietly_written(func, args, kwargs or {})
            seen.append((func._schema.name, {id(tensor) for tensor in quiet}))
            return func(*args, **(kwargs or {}))

    with Watching():
        for training in (True, False):
            made = nn.functional.batch_norm(x.requires_grad_(), mean, var, training=training)
            torch.autograd.grad(made.square().sum(), x)
    norms = [(name, quiet) for name, quiet in seen if "batch_norm" in name]
    assert [bool(quiet) for _, quiet in norms] == [True, False, False, False]  # forward, backward
    assert norms[0][1] == {id(mean), id(var)}


class Tabled(nn.Module):
    """Reads a table in an attribute, and one that lies deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
        self.table, self.tables = random(6, seed=2), SimpleNamespace(other=[random(24, seed=3)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x * self.table) * self.tables.other[0]))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_tensors_in_attributes_are_read_as_they_are(share: float) -> None:
    given = Case(nn.Sequential(*(Tabled() for _ in range(4))).double(), (random(5, 57, 6).requires_grad_(),))
    expected = step(given, copy.deepcopy(given.model))
    with fake_tensors():
        copied = fake_copy(given.model)
    assert not has_data(copied[0].table)
    assert not has_data(copied[0].tables.other[0])
    fitted = given.fit()
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    fitted.replan(int(least + share * (most - least)))
    assert_same(expected, step(given))
    assert fitted.verify(given.args).max_gradient_error < 1e-12
    loss = given.model(*given.args).square().mean()
    given.model[0].table = given.model[0].table * 2
    with pytest.raises(ChangedError, match="table of 0 was changed"):
        loss.backward()


@pytest.mark.parametrize("in_place", [False, True])
def test_state_in_attributes_is_refused(in_place: bool) -> None:
    class Averaging(Tabled):
        def forward(self, x: Tensor) -> Tensor:
            made = super().forward(x)
            if in_place:
                self.table.mul_(0.9).add_(made.detach().mean((0, 1)), alpha=0.1)
            else:
                self.table = 0.9 * self.table + 0.1 * made.detach().mean((0, 1))
            return made

    given = Case(nn.Sequential(*(Averaging() for _ in range(4))).double(), (random(5, 57, 6),))
    with pytest.raises(CaptureError, match="0 changes table, which it reads, and which is no buffer"):
        given.fit()


def test_a_tensor_with_a_graph_in_an_attribute_is_refused() -> None:
    model = nn.Sequential(*(Tabled() for _ in range(4))).double()
    model[1].table = model[0].up.weight.sum(0)
    with pytest.raises(CaptureError, match="with a graph in an attribute"):
        Case(model, (random(5, 57, 6),)).fit()


class Experts(nn.Module):
    """Room for so many tokens; the rest goes by."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.layer = room, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)
        return torch.cat([self.layer(flat[: self.room]), flat[self.room :]]).view_as(x)


def test_what_mixes_above_a_size_alone_is_not_independent() -> None:
    for room, axes in ((1000, [0, 1]), (70, [])):
        module = Experts(room)
        child = child_of(module, torch.zeros(5, 23, 6))
        assert [axis.dim for axis in independent_axes(module, child)] == axes


STATE = {"scale": 1.0, "calls": 0}


class Scales(nn.Module):
    """By what the block has set for its call; or by how often it was called."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
        self.counts = counts

    def forward(self, x: Tensor) -> Tensor:
        STATE["calls"] += 1
        scale = STATE["calls"] if self.counts else STATE["scale"]
        return self.down(torch.tanh(self.up(x * scale)))


class Sets(nn.Module):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.inner = Scales(counts)

    def forward(self, x: Tensor) -> Tensor:
        STATE["scale"] = 2.0
        x = x + self.inner(x)
        STATE["scale"] = 1.0
        return x


@pytest.mark.parametrize("counts", [False, True])
def test_a_module_that_does_not_repeat_itself_is_an_error_and_no_gradient(counts: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Sets(counts) for _ in range(3))).double()
    x = torch.randn(3, 23, 6, dtype=torch.float64).requires_grad_()
    chain = chain_of(Case(model, (x,)))
    runs = (Run(at, Strategy("whole", within=(("inner", "redo"),))) for at in range(3))
    Patched(model, chain, Sequence(tuple(runs))).install()
    with pytest.raises(RuntimeError, match="inner does not do the same when it runs again"):
        model(x).square().mean().backward()


class Segments(MLP):
    """What follows a special number is of another segment; below double precision what it is given is rounded
    to its largest number's hundredths.
    """

    def __init__(self) -> None:
        super().__init__(6)
        self.segments = nn.Embedding(8, 6)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            scale = x.detach().abs().amax() / 100
            x = x + ((x / scale).round() * scale - x).detach()
        return super().forward(torch.tanh(x + self.segments((ids == 102).cumsum(-1))))


class OfSegments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Segments() for _ in range(4))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x, ids)
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_where_special_numbers_and_dtypes_decide(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ids = torch.arange(900)[None] % 100
    ids[:, [200, 600]] = 102
    model = OfSegments().to(dtype)
    given = Case(model, (random(1, 900, 6).to(dtype).requires_grad_(), ids))
    expected = step(given, copy.deepcopy(model))
    fitted = given.fit()
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    for budget in (least, (least + most) // 2):
        fitted.replan(budget)
        assert_same(expected, step(given), 1e-12 if dtype == torch.float64 else 1e-5)


class Tied(MLP):
    def __init__(self) -> None:
        super().__init__(6)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tanh(self.b(torch.tanh(self.a(x))))


def test_gradients_of_other_weights_that_are_tied_within_a_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Tied() for _ in range(4))).double()
    given = Case(model, (random(3, 50, 6),))
    others = {name: p.detach() * 1.5 for name, p in model.named_parameters()}

    def gradients() -> dict[str, Tensor]:
        weights = {name: value.clone().requires_grad_() for name, value in others.items()}
        out = torch.func.functional_call(model, weights, given.args)
        return dict(zip(weights, torch.autograd.grad(out.pow(2).mean(), [*weights.values()]), strict=True))

    expected = gradients()
    fitted = given.fit()
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    for budget in (least, (least + most) // 2):
        fitted.replan(budget)
        assert_same(expected, gradients())


class ReturnsAView(nn.Module):
    """Of a tensor eight times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 128)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x)).view(*x.shape[:-1], 8, 16)
        return y.permute(2, 0, 1, 3).contiguous()[0]


class ReturnsAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.down(torch.tanh(self.up(x))), self.up.weight


class Chain(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(16, 16), nn.ModuleList(kind() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, more = self.first(x), x.new_zeros(())
        for block in self.blocks:
            found = block(x)
            x, *weights = found if isinstance(found, tuple) else (found,)
            more = more + sum(weight.pow(2).mean() for weight in weights)
        return x + more


@pytest.mark.parametrize("kind", [ReturnsAView, ReturnsAParameter])
def test_what_results_keep_is_counted(kind: type[nn.Module]) -> None:
    """The memory behind a view, and nothing for what is there anyway."""
    torch.manual_seed(0)
    given = Case(Chain(kind).double(), (random(4, 100, 16).requires_grad_(),))
    expected = step(given, copy.deepcopy(given.model))
    fitted = given.fit()
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    for budget in (least, (least + most) // 2, most):
        fitted.replan(budget)
        assert_same(expected, step(given))
        found = fitted.verify(given.args, given.kwargs)
        assert 0.97 < found.measured_peak_bytes / found.predicted_peak_bytes <= 1.001


class ReadsAverages(nn.Module):
    """Of what another module averages, in a buffer that both have."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.averaged = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.mlp = MLP(6)
        self.double()  # which makes two of a buffer that has two names
        self.averaged.running_mean, self.averaged.running_var = self.read.running_mean, self.read.running_var

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.averaged(torch.tanh(self.read(x))))


@pytest.mark.parametrize("across", [False, True])
def test_buffers_that_modules_share_are_changed_once(across: bool) -> None:
    model = nn.Sequential(*(ReadsAverages() for _ in range(4)))
    if across:
        for block in model[1:]:
            block.read.running_mean = block.averaged.running_mean = model[0].read.running_mean
    given = Case(model, (random(57, 6).requires_grad_(),))
    expected = step(given, copy.deepcopy(model))
    chain = chain_of(given)
    together = Checkpoint(Sequence(tuple(Run(at, WHOLE) for at in range(4))), (WHOLE,) * 4)
    each = (Run(at, Strategy("whole", within=((SELF, "redo"),))) for at in range(4))
    for schedule in (Sequence((together,)), Sequence(tuple(each))):
        planned = copy.deepcopy(model)
        Patched(planned, chain, schedule).install()
        assert_same(expected, step(given, planned))


class OfComplexNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(*sizes, dtype=torch.complex128) for sizes in ((6, 24), (24, 6)))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.down(torch.tanh(self.up(z)))


def test_complex_states_are_planned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(OfComplexNumbers() for _ in range(4)))
    x = torch.complex(random(3, 50, 6), random(3, 50, 6, seed=1)).requires_grad_()
    given = Case(model, (x,), loss=lambda z: z.abs().square().mean())
    expected = step(given, copy.deepcopy(model))
    fitted = given.fit()
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    for budget in (least, (least + most) // 2):
        fitted.replan(budget)
        assert_same(expected, step(given))
    assert fitted.verify(given.args).ok


class Averages(nn.Module):
    """A normalisation in plain Python, which writes its statistics in training alone: by a kernel, through
    `.data`, in place, or anew.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.mlp, self.how = MLP(6), how
        self.register_buffer("mean", random(6))
        self.register_buffer("var", random(6, seed=3).square())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.how == "kernel":
            flat = nn.functional.batch_norm(x.flatten(0, 1), self.mean, self.var, training=True)
            return x + self.mlp(flat.view_as(x))
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.detach().mean((0, 1)), x.detach().var((0, 1))
            if self.how == "anew":
                self.mean, self.var = 0.9 * self.mean + 0.1 * mean, 0.9 * self.var + 0.1 * var
            else:
                there = (t.data if self.how == "data" else t for t in (self.mean, self.var))
                for average, now in zip(there, (mean, var), strict=True):
                    average.mul_(0.9).add_(now, alpha=0.1)
        return x + self.mlp((x - mean) / (var + 1e-3).sqrt())


@pytest.mark.parametrize("how", ["kernel", "data", "in place", "anew"])
def test_statistics_count_once_or_it_is_said_that_they_do_not(how: str) -> None:
    """Planned in training, they are right; planned in evaluation, that they change then is an error."""
    model = nn.Sequential(*(Averages(how) for _ in range(4))).double()
    given = Case(model, (random(3, 19, 6).requires_grad_(),))
    expected, before = step(given, copy.deepcopy(model)), copy.deepcopy(model.state_dict())
    for trains in (True, False):
        fitted = Case(model.train(trains), given.args).fit()
        least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
        for budget in (least, (least + most) // 2):
            model.load_state_dict(before)
            model.train(trains)
            fitted.replan(budget)
            model.train()
            if trains:
                assert_same(expected, step(given))
                continue
            with pytest.raises(ValueError, match=r"mean of [0-3] has changed in a forward.*mode"):
                step(given)
        fitted.remove()
