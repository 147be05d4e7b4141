"""Devices that fits are planned for, and the times that are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import evoplan
from evoplan.cost_model.calibrate import Calibration
from evoplan.cost_model.times_cache import TimesCache
from evoplan.planner.commands.foreign import built_by
from evoplan.planner.fitting.making import fitting_for
from evoplan.planner.fitting.plan import load_fit_plan
from tests.test_cli import call
from tests.test_fit_commands import source  # noqa: F401
from tests.test_times import ENTRY


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "times.sqlite"
    monkeypatch.setenv("EVOPLAN_CACHE", str(path))
    TimesCache(path, "cpu").put_calibration("float32", Calibration(1e8, 1e8, 1e-3, 0.1, 20))


@pytest.mark.usefixtures("calibrated")
def test_a_roofline_that_is_asked_for_is_not_calibrated(
    source: str,  # noqa: F811
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "plan.json")
    assert call(capsys, "plan", "--from", source, "--times", "roofline", "--out", path)[0] == 0
    plan, built = load_fit_plan(path), built_by(source)
    assert plan.costs["time"] == fitting_for(plan, *built)[0].times == "roofline"
    fitted = evoplan.fit(*built[:2])
    assert fitted.plan.costs["time"] == "calibrated"
    fitted.remove()
    assert fitting_for(fitted.plan, *built)[0].times == "calibrated"
    assert plan.predicted.step_seconds < fitted.plan.predicted.step_seconds / 10


def test_a_device_file_goes_where_a_name_does(
    source: str,  # noqa: F811
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    device, plan, certificate = (str(tmp_path / name) for name in ("mine.json", "plan.json", "c.json"))
    Path(device).write_text(json.dumps(ENTRY))
    assert call(capsys, "plan", "--from", source, "--device", device, "--out", plan)[0] == 0
    found = load_fit_plan(plan)
    assert found.device == found.own_device.name == ENTRY["name"]
    Path(device).unlink()  # the plan has it
    assert call(capsys, "certify", plan, "--from", source, "--out", certificate)[0] == 0
    code, _, error = call(capsys, "inspect", source, "--device", device)
    assert code == 2
    assert "mine.json: cannot be read" in error
    Path(device).write_text(json.dumps(ENTRY))
    assert call(capsys, "inspect", source, "--device", device)[0] == 0
    code, _, error = call(capsys, "inspect", source, "--device", device, "--json", device)
    assert code == 2
    assert "would be overwritten" in error
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(2, 4)
    fitted = evoplan.fit(model, (x,), device=device)
    assert fitting_for(fitted.plan, model, (x,), {}, None)[1] == fitted.plan
    stack = evoplan.EvoformerStack(evoplan.EvoformerConfig(n_block=1, c_m=8, c_z=8))
    inputs = torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 3, 8)
    assert evoplan.make_plan(stack, inputs, device=device).problem.own_device == found.own_device
