"""Commands on models that a file builds: one line per error, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evoplan
from tests.test_cli import call

BUILDS = """
import sys

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def build():
    return nn.Sequential(*(Block() for _ in range(4))), (torch.randn(60, 8),)


def fails():
    raise RuntimeError("no weights")


def leaves():
    raise SystemExit(0)


def three():
    model, args = build()
    return model, args, torch.sum


def odd():
    return 3


class Ends(nn.Sequential):
    def forward(self, x):
        raise SystemExit(3)


def ends():
    model, args = build()
    return Ends(*model), args


def loss_ends():
    return *build(), None, lambda y: sys.exit("bye")


class Late(nn.Sequential):
    def forward(self, x):
        if type(x) is torch.Tensor and not x.is_meta:
            raise KeyError("only with data")
        return super().forward(x)


def late():
    model, args = build()
    return Late(*model), args


def empty():
    return build()[0], (torch.randn(0, 8),)


def narrow():
    return build()[0], (torch.randn(6, 7),)


def without_blocks():
    return nn.Linear(8, 8), (torch.randn(6, 8),)
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(BUILDS)
    return f"{path}:build"


def test_a_model_of_a_file_is_planned_shown_and_swept(
    source: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    plan, frontier, picture = tmp_path / "plan.json", tmp_path / "frontier.json", tmp_path / "frontier.svg"
    code, printed, _ = call(capsys, "plan", "--from", source, "--memory", "1MiB", "--out", str(plan))
    assert code == 0
    assert "Sequential: 4 blocks" in printed
    code, shown, _ = call(capsys, "show", str(plan))
    assert code == 0
    assert shown.strip() in printed
    page = tmp_path / "page.html"
    swept = ["sweep", "--from", source, "--points", "8", "--json", str(frontier), "--plot", str(picture)]
    code, _, said = call(capsys, *swept, "--html", str(page))
    assert code == 0
    assert "point 8 of 8" in said  # where there is no terminal
    assert "<th>forward runs</th>" in page.read_text()
    document = json.loads(frontier.read_text())
    peaks = [point["peak_bytes"] for point in document["points"]]
    seconds = [point["step_seconds"] for point in document["points"]]
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)
    assert peaks[0] < document["baselines"]["large"]["peak_bytes"] < peaks[-1]
    assert json.loads(plan.read_text())["predicted"]["step_seconds"] == seconds[-1]
    assert picture.stat().st_size > 0


def test_inspect_tells_blocks_and_axes(source: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    code, printed, _ = call(capsys, "inspect", source)
    assert code == 0
    assert "independent . along 0 (60)" in printed
    assert call(capsys, "inspect", source, "--json", str(out))[0] == 0
    assert json.loads(out.read_text())["blocks"][1]["axes"]["."] == {"0": 60}


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("nothing", [], "has no function nothing"),
        ("torch", [], "has no function torch"),
        ("ends", [], "ends: its model ends the process (SystemExit: 3); have it raise an error"),
        ("loss_ends", [], "its model ends the process (SystemExit: bye)"),
        ("late", [], "Late fails on what it is called with (KeyError: 'only with data')"),
        ("empty", [], "what the blocks make has no numbers (float32 [0, 8]); give inputs"),
        ("fails", [], "no weights"),
        ("odd", [], "returns something else"),
        ("without_blocks", [], "no modules that are called one after the other"),
        ("build", ["--n-res", "4"], "leave --n-res out"),
        ("build", ["--memory", "1KiB"], "the least that does is"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    source: str, capsys: pytest.CaptureFixture, tmp_path: Path, name: str, more: list[str], said: str
) -> None:
    out = tmp_path / "plan.json"
    source = source.replace("build", name)
    code, printed, error = call(capsys, "plan", "--from", source, *more, "--out", str(out))
    assert code == (3 if "least" in said else 2)
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not printed
    assert not out.exists()


@pytest.mark.parametrize("command", ["inspect", "sweep", "certify"])
def test_a_model_that_ends_the_process_does_not(
    command: str, source: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    plan, ends = str(tmp_path / "plan.json"), source.replace("build", "ends")
    if command == "certify":
        assert call(capsys, "plan", "--from", source, "--out", plan)[0] == 0
    more = {
        "inspect": [ends],
        "sweep": ["--from", ends],
        "certify": [plan, "--from", ends, "--out", "c.json"],
    }
    code, _, error = call(capsys, command, *more[command])
    assert code == 2
    assert "its model ends the process" in error
    assert len(error.strip().splitlines()) == 1


TOP = """
from __future__ import annotations

from dataclasses import dataclass

from beside import BUILT


@dataclass
class Options:
    width: int = 8
    names: list[str] | None = None


def build():
    assert Options().width == 8
    return BUILT
"""
BESIDE = f"{BUILDS}\n\nBUILT = build()\n"


def test_a_file_is_executed_as_python_does(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "random.py"  # of a name that others have
    path.write_text(TOP)
    (tmp_path / "beside.py").write_text(BESIDE)
    assert call(capsys, "plan", "--from", f"{path}:build")[0] == 0
    for top, says in (
        ("import torch\ntorch.nothing\n", "random.py fails: AttributeError: module 'torch' has no attribute"),
        ("import sys\nsys.exit(3)\n", "random.py fails: SystemExit: 3"),
        ("def f(:\n", "random.py fails: SyntaxError"),
        ("import nowhere_at_all\n", "random.py fails: ModuleNotFoundError"),
    ):
        path.write_text(top)
        code, _, error = call(capsys, "plan", "--from", f"{path}:build")
        assert code == 2
        assert says in error
        assert len(error.strip().splitlines()) == 1


def test_a_wrong_shape_is_not_also_logged(source: str, capsys: pytest.CaptureFixture) -> None:
    log, seen = logging.getLogger("torch._subclasses.fake_tensor"), logging.Handler()
    said: list[str] = []
    seen.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(seen)
    try:
        code, _, error = call(capsys, "plan", "--from", source.replace("build", "narrow"))
        assert code == 2
        assert "cannot be copied or run without data (RuntimeError: " in error
        assert not said
        with FakeTensorMode(), pytest.raises(RuntimeError):  # elsewhere it is
            torch.zeros(2, 3) @ torch.zeros(2, 3)
        assert len(said) == 1
    finally:
        log.removeHandler(seen)


def test_a_sweep_has_all_budgets(source: str, capsys: pytest.CaptureFixture) -> None:
    code, _, error = call(capsys, "sweep", "--from", source, "--memory", "1GiB")
    assert code == 2
    assert "leave --memory out" in error


@pytest.mark.parametrize(("name", "says"), [("leaves", "fails: SystemExit"), ("three", "a dictionary")])
def test_a_file_that_does_otherwise_is_one_line(
    source: str, name: str, says: str, capsys: pytest.CaptureFixture
) -> None:
    code, _, error = call(capsys, "plan", "--from", source.replace("build", name), "--memory", "1MiB")
    assert code == 2
    assert says in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [("plan", "--out"), ("plan", "--json"), ("sweep", "--html"), ("sweep", "--plot")]
)
def test_the_file_of_a_model_is_not_written_over(
    source: str, arguments: tuple[str, str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = Path(source.rpartition(":")[0])
    link = tmp_path / "link.svg"
    link.symlink_to(path)
    command, flag = arguments
    code, _, error = call(capsys, command, "--from", source, flag, str(link if flag == "--plot" else path))
    assert code == 2
    assert "would be overwritten" in error
    assert path.read_text() == BUILDS


def test_what_fit_is_given_is_looked_at() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for args, more, says in (
        (torch.zeros(2, 8), {}, r"give a tuple, such as \(x,\)"),
        ((torch.zeros(2, 8),), {"optimizer": "adam"}, "choose none or sgd or adamw"),
    ):
        with pytest.raises(ValueError, match=says):
            evoplan.fit(model, args, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model is of class int"):
        evoplan.fit(3, ())  # type: ignore[arg-type]
