"""What is kept of fitted models is what would be found, under a key of all that it follows from."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import evoplan
from evoplan.cost_model import children
from evoplan.cost_model.calls import CallTracing
from evoplan.cost_model.kept_fits import KeptFits
from evoplan.model.foreign.sources import sources_of, told
from evoplan.planner.fitting.simulating import Simulator
from tests.zoo import random


class Block(nn.Module):
    """Little to look into."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVOPLAN_TRACES", str(tmp_path / "traces"))
    return tmp_path


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is found from here on, not read."""
    names: list[str] = []

    def noted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def run(*args: Any) -> Any:
            names.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, run)

    noted(CallTracing, "cost")
    noted(Simulator, "step")
    noted(children, "independent_axes")
    return names


def model_of(make: Callable[[], nn.Module] = Block) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(make() for _ in range(3))).double()


def plan_of(model: nn.Module, budget: int | None = None) -> Any:
    fitted = evoplan.fit(model, (random(40, 12),), budget=budget)
    fitted.remove()
    return fitted


def test_what_is_read_is_what_was_found(found: list[str]) -> None:
    first = plan_of(model_of())
    least = first.frontier()[0].peak_bytes
    first.replan(least)
    assert {"cost", "step", "independent_axes"} == set(found)
    found.clear()
    again = plan_of(model_of(), budget=least)
    assert not found
    assert again.plan.schedule == first.plan.schedule
    assert again.plan.predicted == first.plan.predicted
    assert again.plan.baselines == first.plan.baselines
    x = random(40, 12)
    again.replan(least)  # it was removed
    verified = again.verify((x,))  # the axes that were read serve as those that were found
    assert verified.ok
    assert verified.max_gradient_error < 1e-10


@pytest.mark.parametrize("change", ["a rate", "a width", "a frozen weight", "a hook", "a loss", "a layer"])
def test_what_follows_from_something_else_is_found_anew(found: list[str], change: str) -> None:
    plan_of(model_of())
    found.clear()
    model, loss = model_of(), None
    block = model[1]
    assert isinstance(block, Block)
    if change == "a rate":
        block.mlp[2].p = 0.2
    elif change == "a width":
        block.mlp[0], block.mlp[3] = nn.Linear(12, 32).double(), nn.Linear(32, 12).double()
    elif change == "a frozen weight":
        block.mlp[3].weight.requires_grad_(False)
    elif change == "a hook":
        block.mlp[3].register_forward_hook(lambda module, args, out: out + 0)
    elif change == "a loss":
        loss = sum_of_cubes
    else:
        block.mlp[1] = nn.SiLU()
    fitted = evoplan.fit(model, (random(40, 12),), **({} if loss is None else {"loss": loss}))
    fitted.remove()
    assert "step" in found
    assert change == "a loss" or "cost" in found


def sum_of_cubes(out: torch.Tensor) -> torch.Tensor:
    return out.pow(3).mean()


def test_what_cannot_be_told_is_not_kept(found: list[str]) -> None:
    model = model_of()
    model[1].register_buffer("seen", torch.zeros(1))
    model[1].act = lambda x, by=model: x  # a default is something that nobody here can tell
    plan_of(model)
    found.clear()
    plan_of(model)
    assert {"cost", "step"} <= set(found)


def loaded(path: Path, text: str, name: str) -> ModuleType:
    """A module of this text."""
    path.write_text(text)
    os.utime(path, ns=(len(text) * 10**9, len(text) * 10**9))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_sources_reach_what_is_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kept_inner", "kept_outer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.syspath_prepend(str(folder))
    text = "from torch import nn\nfrom kept_inner import f\nclass Layer(nn.Identity): pass\n"

    def digest(inner: str) -> str | None:
        loaded(folder / "kept_inner.py", inner, "kept_inner")
        return sources_of([loaded(folder / "kept_outer.py", text, "kept_outer").Layer])

    first = digest("def f(x): return x\n")
    assert first is not None
    assert digest("def f(x): return x\n") == first
    assert digest("def f(x): return 2 * x\n") != first


def test_what_comes_from_no_file_is_not_kept() -> None:
    typed = type("Typed", (nn.Identity,), {"__module__": "__nowhere__"})
    assert sources_of([typed]) is None
    kept = KeptFits(nn.Sequential(typed()))
    found = [kept.recall(("a",), lambda: 1, str, int), kept.recall(("a",), lambda: 2, str, int)]
    assert found == [1, 2]


def test_a_text_that_is_none_is_found_anew() -> None:
    kept = KeptFits(nn.Linear(2, 2))
    assert kept.recall(("a",), lambda: 1, lambda _: "one", int) == 1
    assert kept.recall(("a",), lambda: 2, str, int) == 2
    assert kept.recall(("a",), lambda: 3, str, int) == 2


def test_attributes_are_told() -> None:
    one, other = nn.Dropout(0.1), nn.Dropout(0.2)
    assert told(one) != told(other)
    assert told(one) == told(nn.Dropout(0.1))
    assert told(one) != told(one.eval())
    other.register_forward_pre_hook(lambda *_: None)
    assert told(other) is None
    put = nn.Linear(2, 2)
    put.forward = lambda x: x  # type: ignore[method-assign]
    assert told(put) is None
    at = nn.Linear(2, 2)
    at.anything = object()  # type: ignore[assignment]
    assert told(at) is None
    hooked = nn.Linear(2, 2)
    hooked.weight.register_hook(lambda grad: grad)
    assert told(hooked) is None


def test_a_method_put_into_a_class_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = told(Block())
    monkeypatch.setattr(Block, "forward", lambda self, x: x)
    assert told(Block()) != before


def decorated(function: Callable[..., Any], rate: float) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return rate * function(self, x)

    return forward


def test_what_a_decorator_decorates_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(function: Callable[..., Any], rate: float) -> str | None:
        monkeypatch.setattr(Block, "forward", decorated(function, rate))
        return told(Block())

    first = text(lambda self, x: x, 1.0)
    assert first is not None
    others = text(lambda self, x: x + 1, 1.0), text(lambda self, x: x + 2, 1.0), text(lambda self, x: x, 2.0)
    assert len({first, *others}) == 4


def test_a_list_that_is_in_itself_is_not_told() -> None:
    layer = nn.Linear(2, 2)
    layer.around = []  # type: ignore[assignment]
    layer.around.append(layer.around)  # type: ignore[operator, union-attr]
    assert told(layer) is None
