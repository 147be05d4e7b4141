"""The built wheel takes one import name and no other, beside a user's own `model/`, `planner.py` and such."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a user's project may well call its own: two folders without __init__.py, a module, a package.
OWN = {
    "model/net.py": "WHO = 'mine'",
    "experiments/first.py": "WHO = 'mine'",
    "planner.py": "WHO = 'mine'",
    "cost_model/__init__.py": "WHO = 'mine'",
}
BOTH_SIDES = """
import cost_model, planner
from experiments import first
from model import net
assert {part.WHO for part in (cost_model, planner, first, net)} == {"mine"}
import sys, evoplan
assert "torch" not in sys.modules
assert "site-packages" in evoplan.__file__, evoplan.__file__
for name in evoplan.__all__:
    getattr(evoplan, name)
import evoplan.experiments.demo
print("both")
"""


# Without what whoever runs these tests has set: it may lead back to the checkout.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
        check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel installed and, beside it, what this one has, but not this checkout."""
    folder = tmp_path_factory.mktemp("install")
    # A copy, so that the build leaves nothing in the checkout and takes nothing that an earlier one left.
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A path in a .pth file is searched, but .pth files there (an editable install) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_beside_modules_of_the_same_names(python: Path, tmp_path: Path) -> None:
    for name, content in OWN.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content + "\n")
    assert run(python, "-c", BOTH_SIDES, cwd=tmp_path) == "both\n"
    for command in (("-m", "evoplan"), ("-m", "evoplan.planner")):
        assert "verify" in run(python, *command, "--help", cwd=tmp_path)
    assert "verify" in run(python.parent / "evoplan", "--help", cwd=tmp_path)


def test_nothing_else_is_importable(python: Path, tmp_path: Path) -> None:
    for name in ("model", "planner", "cost_model", "experiments", "tests"):
        done = subprocess.run(
            [str(python), "-c", f"import {name}"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            check=False,
        )
        assert done.returncode != 0, f"the wheel makes `import {name}` work"
