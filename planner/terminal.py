"""Where commands meet the terminal: exit codes, one line per error, progress, paths to write to."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from evoplan.cost_model.allocator import keep_freed_memory
from evoplan.planner.errors import RunError
from evoplan.planner.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT, INFEASIBLE, CHECK_FAILED = 2, 3, 1
NO_MEMORY = "this machine's memory is not enough; use smaller sizes, fewer blocks or a smaller --memory"


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal; nothing where output goes to a file."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda text: status.update(text)


def console_for_output(width: int = 110) -> Console:
    """As wide as the terminal, or wide enough for every table."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def check_writable(*paths: str | None) -> None:
    """Refuse a path that cannot be written before the work is done."""
    for path in filter(None, paths):
        parent = Path(path).absolute().parent
        if not parent.is_dir():
            raise ValueError(f"{path}: folder {parent} does not exist; make it first")
        if Path(path).is_dir():
            raise ValueError(f"{path}: is a folder; name a file")
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"{path}: is not an ordinary file; name one")
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{path}: folder {parent} is not writable; name another")


def make_folder(path: str) -> Path:
    """The folder, made if it is not there.

    Raises:
        ValueError: it cannot be made, or written to; the message names it.
    """
    if not path:
        raise ValueError("a folder without a name; name one")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be made a folder ({error.strerror}); name another") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path}: folder is not writable; name another")
    return Path(path)


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> None:
    """Run a command: one line per error, exit codes 2 (bad input), 3 (no plan fits), 1 (a check failed).

    Steps are timed and run with the allocator in the same state, whichever command does it.
    """
    keep_freed_memory()

    def fail(message: str, code: int) -> NoReturn:
        click.echo(f"{name}: {' '.join(message.split())}", err=True)
        sys.exit(code)

    try:
        command.main(args=arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
    except click.ClickException as error:
        fail(f"{error.format_message()} (see {name} --help)", BAD_INPUT)
    except click.exceptions.Abort:
        fail("interrupted", 130)
    except MemoryError:
        fail(NO_MEMORY, CHECK_FAILED)
    except RuntimeError as error:
        if isinstance(error, RunError):
            fail(str(error), CHECK_FAILED)
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        fail(NO_MEMORY, CHECK_FAILED)
    except (ValueError, OSError) as error:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            fail(where + first["msg"].removeprefix("Value error, "), BAD_INPUT)
        least = getattr(error, "least_feasible_bytes", None)
        if least is not None:
            fail(f"{error} = {format_size(least)}", INFEASIBLE)
        fail(str(error), BAD_INPUT)
