"""Imports go one way: model <- cost_model <- planner <- experiments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ORDER = ["model", "cost_model", "planner", "experiments"]
# The rooms of a package, and what lies at its top, from the bottom: each imports from those before it.
ROOMS = {
    "model": [
        "config", "families", "running", "modules", "adapters", "foreign", "data", "programs", "build",
        "sharing", "__init__",
    ],
    "planner": [
        "sizes", "errors", "arguments", "files", "schedules", "solvers", "problems", "plans",
        "pages", "processes", "execution", "checking", "fitting", "reports", "runs", "commands", "__init__",
        "__main__",
    ],
}  # fmt: skip
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


def imported(path: Path) -> Iterator[str]:
    """Modules of evoplan that a file imports, wherever in it and be it for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("evoplan."):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_rooms_go_one_way() -> None:
    for package, rooms in ROOMS.items():
        inside = f"evoplan.{package}."
        for path in (ROOT / package).rglob("*.py"):
            own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
            for name in imported(path):
                if name.startswith(inside):
                    other = name.removeprefix(inside).split(".")[0]
                    assert rooms.index(other) <= rooms.index(own), f"{path} imports {name}"


def test_no_circle_of_imports() -> None:
    graph = nx.DiGraph()
    files = {
        ".".join(("evoplan", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for package in ORDER
        for path in (ROOT / package).rglob("*.py")
    }
    for module, path in files.items():
        graph.add_edges_from((module, name) for name in imported(path) if name in files and name != module)
    assert len(graph) > 100
    circle = next(nx.simple_cycles(graph), None)
    assert circle is None, " imports ".join(circle)
