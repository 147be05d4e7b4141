"""`evoplan.fit` on the originals' own code: each example, from the least memory to the most."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evoplan.planner.commands.foreign import built_by
from tests.test_fit import assert_same, step
from tests.zoo import Case

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDS = {"boltz": ["boltz", "einops"], "openfold3": ["openfold3"]}
NEEDS |= {name: ["transformers"] for name in ("llama", "bert", "vit", "esmfold")}


def built(path: Path, dtype: torch.dtype = torch.float32) -> Case:
    """A model with no weight zero: the originals start some at zero, which would hide errors."""
    for name in NEEDS.get(path.stem.partition("_")[0], ()):
        pytest.importorskip(name)
    given = Case(*built_by(f"{path}:build")[:4])
    with torch.no_grad():
        for parameter in given.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    kwargs = {name: cast(value) for name, value in given.kwargs.items()}
    return given._replace(model=given.model.to(dtype), args=tuple(map(cast, given.args)), kwargs=kwargs)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_gradients_and_peak(path: Path) -> None:
    given = built(path)
    fitted = given.fit()
    least, most = fitted.plan.least_feasible_bytes, fitted.plan.predicted.peak_bytes
    assert least < 0.9 * most
    for part in (0, 1, 4):
        budget = least + (most - least) * part // 4
        fitted.replan(budget)
        found = fitted.verify(given.args, given.kwargs)
        assert found.measured_peak_bytes <= found.predicted_peak_bytes <= budget
        assert found.measured_peak_bytes >= 0.98 * found.predicted_peak_bytes
        assert found.max_gradient_error <= 1e-5
        assert found.ok, found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_gradients_in_double_precision(path: Path) -> None:
    if path.stem == "boltz_pairformer":
        pytest.skip("its own code casts to single precision")
    given = built(path, torch.float64)
    expected = step(given, copy.deepcopy(given.model))
    fitted = given.fit()
    fitted.replan(fitted.plan.least_feasible_bytes)
    assert_same(expected, step(given), 1e-10)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
