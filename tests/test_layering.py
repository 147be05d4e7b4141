"""Imports go one way: model <- cost_model <- planner <- experiments."""

from __future__ import annotations

import ast
from pathlib import Path

ORDER = ["model", "cost_model", "planner", "experiments"]
ROOT = Path(__file__).parents[1]


def test_imports_go_one_way() -> None:
    seen = 0
    for level, package in enumerate(ORDER):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: relative import"
                    names = [node.module or ""]
                for name in names:
                    top, _, rest = name.partition(".")
                    assert top not in ORDER, f"{path} imports {name}, which is evoplan.{name}"
                    package = rest.split(".")[0]
                    if top == "evoplan" and package in ORDER:
                        seen += 1
                        assert ORDER.index(package) <= level, f"{path} imports {name}"
    assert seen > 50


def test_only_the_executor_sees_a_schedule_and_modules() -> None:
    for path in [*(ROOT / "model").rglob("*.py"), *(ROOT / "cost_model").rglob("*.py")]:
        assert "planner" not in path.read_text(), f"{path} speaks of the planner"
