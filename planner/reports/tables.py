"""What all tables have in common."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table

from evoplan.model.running.chain import Chain
from evoplan.planner.problems.costing import planned_model
from evoplan.planner.problems.problem import Problem
from evoplan.planner.sizes import exact_size

SHORT = 24  # characters: what is no longer is a figure or a name, and stays on one line


def describe_problem(problem: Problem) -> str:
    """One line."""
    config, shape = problem.config, problem.shape
    budget = "no budget" if problem.budget_bytes is None else f"budget {exact_size(problem.budget_bytes)}"
    ranks = f" on each of {problem.ranks} ranks" if problem.ranks > 1 else ""
    donated = " of donated inputs" * problem.donate
    return (
        f"{problem.model}: {config.n_block} blocks, {shape}, "
        f"{problem.precision} {problem.mode}{donated} on {problem.device}, {budget}{ranks}"
    )


def new_table(title: str, *columns: str) -> Table:
    """The first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def print_table(table: Table, console: Console, keys: int = 1) -> None:
    """Print a table, in several parts where the terminal is narrower than its figures.

    Args:
        keys: how many columns say what a row is about; each part begins with them.
    """
    for column in table.columns:
        cells = [str(cell) for cell in column.cells]
        longest = max(map(len, cells), default=0)
        if longest <= SHORT and not _many_words(cells):
            column.no_wrap, column.min_width = True, max(longest, len(str(column.header)))
    for part in _parts(table, console, keys):
        console.print(part)


def _many_words(cells: list[str]) -> bool:
    """Whether a column has lists or sentences, which may go on in another line."""
    return any(cell.count(" ") > 2 for cell in cells)


def _parts(table: Table, console: Console, keys: int) -> list[Table]:
    """The fewest tables that are narrow enough, of about as many columns each."""
    anywhere = console.options.update(max_width=10_000)
    others = range(keys, len(table.columns))
    for count in range(1, len(others) + 1):
        ends = [keys + len(others) * number // count for number in range(count + 1)]
        found = [_part(table, [*range(keys), *range(*span)]) for span in pairwise(ends)]
        if all(console.measure(part, options=anywhere).minimum <= console.width for part in found):
            return found
    return [table]


def _part(table: Table, columns: list[int]) -> Table:
    """Some columns of a table; the title is with the first of those that are no keys."""
    taken = [table.columns[number] for number in columns]
    part = new_table(str(table.title), *(str(column.header) for column in taken))
    for column, old in zip(part.columns, taken, strict=True):
        column.no_wrap, column.min_width = old.no_wrap, old.min_width
    for row, cells in zip(table.rows, zip(*(column.cells for column in taken), strict=True), strict=True):
        part.add_row(*cells, style=row.style)
    return part


@cache
def step_names(problem: Problem) -> list[str]:
    """Qualified names of the steps that a problem's plan is for, in order."""
    return [step.name for step in Chain.of(planned_model(problem)).steps]


def fold(lines: list[str], limit: int = 60) -> list[str]:
    """At most `limit` lines: the middle is counted, not shown."""
    if len(lines) <= limit:
        return lines
    half = limit // 2
    return [
        *lines[:half],
        f"... {len(lines) - 2 * half} lines more; all are in the plan file ...",
        *lines[-half:],
    ]
