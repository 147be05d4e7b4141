"""`evoplan.fit` on the originals' own code: each example, from the least memory to the most."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evoplan.cost_model.children import with_children
from evoplan.cost_model.devices import device
from evoplan.model.foreign.capture import Captured
from evoplan.model.foreign.rehearsal import rehearsed
from evoplan.planner.commands.foreign import built_by
from evoplan.planner.fitting.patched import Patched
from evoplan.planner.fitting.simulating import Given, captured
from tests.test_fit import assert_same, check_at_five_budgets, step
from tests.torchrun import alone
from tests.zoo import Case

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
CASTS = {"boltz_pairformer"}  # its own code goes over to single precision
NEEDS = {"boltz": ["boltz", "einops"], "openfold3": ["openfold3"]}
NEEDS |= {name: ["transformers"] for name in ("llama", "bert", "vit", "esmfold")}


def needed(path: Path) -> None:
    """Skip where an original is not installed."""
    for name in NEEDS.get(path.stem.partition("_")[0], ()):
        pytest.importorskip(name)


def built(path: Path, dtype: torch.dtype = torch.float32) -> Case:
    """A model with no weight zero: the originals start some at zero, which would hide errors."""
    needed(path)
    given = Case(*built_by(f"{path}:build")[:4])
    with torch.no_grad():
        for parameter in given.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    kwargs = {name: cast(value) for name, value in given.kwargs.items()}
    return given._replace(model=given.model.to(dtype), args=tuple(map(cast, given.args)), kwargs=kwargs)


QUICK = {"openfold3_pairformer", "bert", "gpt", "cnn"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow, id=p.stem) for p in EXAMPLES],
)
def test_gradients_and_peaks_at_five_budgets(path: Path) -> None:
    """In single precision as it comes; the same schedules in double precision, but where the code casts."""
    given = built(path)
    fitted = given.fit()
    assert fitted.plan.least_feasible_bytes < 0.9 * fitted.plan.predicted.peak_bytes
    schedules = check_at_five_budgets(given, fitted, 1e-5)
    if path.stem in CASTS:
        return
    given = built(path, torch.float64)
    expected, chain = step(given, copy.deepcopy(given.model)), in_double_precision(given)
    for schedule in schedules:
        model = copy.deepcopy(given.model)
        Patched(model, chain, schedule).install()
        assert_same(expected, step(given, model), 1e-10)


def in_double_precision(given: Case) -> Captured:
    """The chain of its blocks' calls as `fit` has it; without costs, which take longest."""
    model, cpu = given.model, device("cpu")
    chain = captured(model, Given.of(given.args, given.kwargs), cpu, given.loss)
    chain = rehearsed(model, chain, lambda: model(*given.args, **given.kwargs))
    return with_children(model, chain, cpu, "float64")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == "sequential" else pytest.mark.slow) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_examples_run_as_scripts(path: Path) -> None:
    """As a reader starts them: plan, train, verify; the promise is kept within the budget that they name."""
    needed(path)
    done = alone(str(path))
    assert done.code == 0, done.err
    assert "ok=True" in done.out
