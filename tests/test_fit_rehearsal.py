"""Models that do more than compute: what `evoplan.fit` runs leaves nothing behind, or it is said why not."""

from __future__ import annotations

import copy
import random as python_random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evoplan
from tests.test_fit import assert_same, step
from tests.zoo import MLP, Case, random


class Layer(MLP):
    def __init__(self) -> None:
        super().__init__(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Stack(nn.Module):
    """Blocks, and what stands around them."""

    def __init__(self, kind: type[nn.Module] = Layer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(4))

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = self.between(block(x))
        return x

    def between(self, x: Tensor) -> Tensor:
        return x


def check(model: nn.Module, *args: Any) -> evoplan.Fitted:
    """The model's own gradients at the least budget and half-way to all; and it is fitted."""
    given = Case(model.double(), args)
    expected = step(given, copy.deepcopy(model))
    fitted = given.fit()
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    for budget in (least, (least + most) // 2):
        fitted.replan(budget)
        assert_same(expected, step(given))
    assert fitted.verify(args).ok
    return fitted


class Notes(Stack):
    """Counts, lists, writes into what it is given, draws, and empties a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.calls, self.seen, self.by_name = True, 0, [0], {"lists": [0]}

    def forward(self, batch: Any) -> Tensor:
        self.first, self.calls, self.last = False, self.calls + 1, batch["x"]
        self.seen.append(python_random.random())
        self.by_name["lists"].append(float(np.random.rand()))
        batch["about"].count += 1
        batch["more"].append(torch.rand(1))
        return super().forward(batch.pop("x").mul_(2))


def test_models_and_what_they_are_called_with_are_left_as_they_were() -> None:
    model, x = Notes().double(), random(2, 57, 6)
    batch = {"x": x, "about": SimpleNamespace(count=0, tensor=x), "more": [1]}
    states = torch.get_rng_state(), python_random.getstate(), np.random.get_state()[2]
    fitted = evoplan.fit(model, (batch,))
    fitted.replan(fitted.plan.least_feasible_bytes)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (python_random.getstate(), np.random.get_state()[2])
    assert fitted.verify((batch,)).ok
    assert list(batch) == ["x", "about", "more"]
    assert (batch["more"], batch["about"].count) == ([1], 0)
    assert batch["x"] is batch["about"].tensor is x
    assert torch.equal(x, random(2, 57, 6))
    fitted.remove()
    model = Notes().double()
    evoplan.fit(model, (batch,)).remove()
    assert vars(model).keys() == vars(Notes()).keys()
    assert (model.first, model.calls, model.seen, model.by_name) == (True, 0, [0], {"lists": [0]})


def test_what_fails_on_noughts_is_planned_without_a_rehearsal() -> None:
    class Decomposes(Stack):
        def between(self, x: Tensor) -> Tensor:
            return x + 0.01 * torch.linalg.cholesky(x.mT @ x).sum()

    check(Decomposes(), random(2, 57, 6))


class Tabled(Layer):
    """Makes a table at its first call, or another for more places."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.places, self.tables = how, 0, {}
        self.register_buffer("buffer", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.places < n:
            self.places = n
            made = torch.arange(n, dtype=x.dtype, device=x.device)[:, None].cos()
            if self.how == "attribute":
                self.table = made
            elif self.how == "buffer":
                self.buffer = made
            else:
                self.tables[n] = made, made.sin()
        table = {"attribute": "table", "buffer": "buffer"}.get(self.how)
        return super().forward(x * (self.tables[n][1] if table is None else getattr(self, table)[:n]))


@pytest.mark.parametrize("how", ["attribute", "buffer", "dictionary"])
def test_tables_that_are_made_at_the_first_call_are_planned(how: str) -> None:
    model = Stack(lambda: Tabled(how))
    given = Case(model.double(), (random(2, 57, 6),))
    expected = step(given, copy.deepcopy(model))
    fitted = given.fit()
    fitted.replan(fitted.plan.least_feasible_bytes)
    found = step(given)
    assert_same(expected, {name: found[name] for name in expected})
    assert fitted.verify(given.args).ok


class Leaves(Layer):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        if self.what == "number":
            self.left = made.shape[1] / 2
        elif self.what == "view":
            self.left = self.up.weight.view(-1)
        elif self.what == "item":
            self.left = made.sum().item()
        else:
            self.left = made.square().mean()
        return made


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("number", "nor read what they leave in attributes"),
        ("view", "nor read what they leave in attributes"),
        ("item", "looks at the values of tensors.*after the step"),
        ("tensor", "keeps a tensor that a gradient is wanted of.*have it return that"),
    ],
)
def test_what_blocks_leave_for_the_model_is_refused_in_one_line(what: str, says: str) -> None:
    class Reads(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + sum(torch.as_tensor(block.left).sum() for block in self.blocks)

    model = Reads(lambda: Leaves(what)).double()
    with pytest.raises(evoplan.CaptureError, match=says) as found:
        evoplan.fit(model, (random(2, 5, 6),))
    assert "\n" not in str(found.value)
    assert not any("left" in vars(block) for block in model.blocks)


@pytest.mark.parametrize("within", [False, True])
def test_sparse_gradients_are_refused(within: bool) -> None:
    class Looks(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 6, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.words(torch.arange(5)))

    blocks = Stack(Looks if within else Layer)
    model = blocks if within else nn.Sequential(nn.EmbeddingBag(9, 6, sparse=True, mode="sum"), blocks)
    given = random(2, 5, 6).float() if within else torch.randint(9, (3, 5))
    with pytest.raises(evoplan.CaptureError, match="gradient is sparse"):
        evoplan.fit(model, (given,))


FOUND: dict[str, float] = {}


class ReadsWhatIsFound(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * FOUND["scale"])


def test_blocks_that_do_not_run_by_themselves_are_refused_in_one_line() -> None:
    class Sets(Stack):
        def forward(self, x: Tensor) -> Tensor:
            FOUND["scale"] = 2.0
            try:
                return super().forward(x)
            finally:
                FOUND.clear()

    with pytest.raises(evoplan.CaptureError, match=r"blocks of Sets do not run by themselves.*KeyError"):
        evoplan.fit(Sets(ReadsWhatIsFound).double(), (random(2, 5, 6),))
