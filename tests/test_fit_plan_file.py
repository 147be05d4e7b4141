"""Plan files of `evoplan.fit`: whoever reads one knows what it is, and altered ones are one line."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evoplan
from evoplan.planner.fitting.certifying import certificate_of_fit
from evoplan.planner.fitting.making import fitting_for
from evoplan.planner.fitting.plan import load_fit_plan
from tests.test_cli import SMALL, call
from tests.test_fit_commands import source  # noqa: F401

ABSENT = object()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)))


X = torch.zeros(3, 4)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    fitted = evoplan.fit(model(), (X,), budget="1MiB")
    return fitted.certify().to_json()


def sealed(document: dict[str, Any], path: Path) -> Path:
    content = {name: value for name, value in document.items() if name != "digest"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "digest": hashlib.sha256(canonical.encode()).hexdigest()}))
    return path


def places(document: Any, *before: Any) -> Iterator[tuple[Any, ...]]:
    parts = document.items() if isinstance(document, dict) else enumerate(document)
    for name, part in parts if isinstance(document, dict | list) else ():
        yield (*before, name)
        if isinstance(part, dict | list):
            yield from places(part, *before, name)


def altered(document: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(document)
    *path, last = place
    within: Any = found
    for name in path:
        within = within[name]
    if value is ABSENT:
        del within[last]
    else:
        within[last] = value
    return found


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_whoever_reads_another_plan_is_told_what_to_do(
    source: str,  # noqa: F811
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    fit, own, certificate = (str(tmp_path / name) for name in ("fit.json", "own.json", "certificate.json"))
    assert call(capsys, "plan", "--from", source, "--out", fit)[0] == 0
    assert call(capsys, "plan", *SMALL, "--out", own)[0] == 0
    for arguments in (["verify", fit], ["run", fit], ["verify", fit, "--simulate"]):
        code, _, error = call(capsys, *arguments)
        assert code == 2
        assert len(error.strip().splitlines()) == 1
        assert "a plan of a model that somebody else wrote" in error
        assert "evoplan.fit(model, args, plan=path)" in error
    with pytest.raises(ValueError, match=r"own models; `evoplan verify` and `evoplan run` take it") as error:
        evoplan.fit(model(), (X,), plan=own)
    one_line(error)
    assert call(capsys, "certify", fit, "--from", source, "--out", certificate)[0] == 0
    for command in ("show", "verify"):
        code, _, error = call(capsys, command, certificate)
        assert code == 2
        assert "a certificate, no plan" in error


def test_keys_may_come_in_any_order(
    document: dict[str, Any], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({name: document[name] for name in reversed(document)}, indent=4))
    code, printed, _ = call(capsys, "show", str(path))
    assert code == 0
    assert "Sequential: 2 blocks" in printed


def test_every_field_may_be_altered(document: dict[str, Any], tmp_path: Path) -> None:
    """Deleted, of another type, or out of range: refused, or a plan that can be printed."""
    path = tmp_path / "plan.json"
    content = {name: part for name, part in document.items() if name != "digest"}
    for place in places(content):
        for value in (ABSENT, None, "x", -1, 10**400, True, [], {}):
            said = loaded(sealed(altered(content, place, value), path))
            assert str(path) in said or "2 blocks" in said


def loaded(path: Path) -> str:
    """A plan in words, or why it is none."""
    try:
        return load_fit_plan(path).report()
    except ValueError as error:
        return str(error) if len(str(error).splitlines()) == 1 else ""


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("costs", "time"), ABSENT, "costs lacks time; make it again"),
        (("costs",), {}, "costs lacks memory, time"),
        (("costs", "time"), "x", "costs.time is 'x'; there are: measured, calibrated, roofline"),
        (("baselines", "none"), ABSENT, "baselines lacks none"),
        (("precision",), "nothing mixed", "precision is 'nothing mixed'; it is a dtype"),
        (("precision",), "int64", "precision is 'int64'"),
        (("precision",), "bfloat16 mixed", "the plan's precision is bfloat16 mixed, here float32; fit anew"),
        (("optimizer",), "none", "the plan's optimizer is none, here adamw; fit anew"),
        (("blocks", 0), "head", "the plan's blocks are head, 1, here 0, 1; fit anew"),
        (("budget_bytes",), 1, "predicted.peak_bytes is more than budget_bytes"),
    ],
)
def test_what_a_plan_says_is_so(
    document: dict[str, Any], place: tuple[Any, ...], value: Any, says: str, tmp_path: Path
) -> None:
    path = sealed(altered(document, place, value), tmp_path / "plan.json")
    with pytest.raises((ValueError, evoplan.CaptureError)) as error:
        evoplan.fit(model(), (X,), plan=path)
    assert says in one_line(error)


def test_a_certificate_says_whose_times_it_has(document: dict[str, Any], tmp_path: Path) -> None:
    plan = load_fit_plan(sealed(altered(document, ("costs", "time"), "calibrated"), tmp_path / "plan.json"))
    fitting, _ = fitting_for(plan, model(), (X,), {}, None)
    assert certificate_of_fit(fitting, plan)["about"]["times"] == fitting.times == "roofline"
