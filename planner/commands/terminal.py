"""Where commands meet the terminal: exit codes, one line per error, progress, output that nobody reads."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from evoplan.cost_model.allocator import keep_freed_memory
from evoplan.planner.errors import RunError
from evoplan.planner.files import STDOUT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

BAD_INPUT, INFEASIBLE, CHECK_FAILED = 2, 3, 1
NO_MEMORY = "this machine's memory is not enough; use smaller sizes, fewer blocks or a smaller --memory"


@contextmanager
def loading() -> Iterator[None]:
    """Around imports: torch makes so many objects that looking for garbage among them takes a third of it.

    There is none, and all of them stay: they are not looked at later either.
    """
    if "torch" in sys.modules or not gc.isenabled():  # not this process's first command
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Progress:
    """What a command is at, on standard error: called with it, and told of each part that is done.

    What it is at is a spinner on a terminal, and nothing elsewhere; a part that is done is a line on both.
    """

    def __init__(self, console: Console, status: Status) -> None:
        self._console, self._status = console, status

    def __call__(self, text: str) -> None:
        self._status.update(text)

    def done(self, text: str) -> None:
        """One of several parts that take a while is through."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A spinner on a terminal; where output goes to a file, the lines of `Progress.done` alone."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(what) as status:
        yield Progress(console, status)


def console_for_output(width: int = 110, json_path: str | None = None) -> Console:
    """As wide as the terminal, or as COLUMNS says, or wide enough for every table; prints text as it is.

    Args:
        json_path: where the result goes as JSON; is that standard output, words go to standard error.
    """
    from rich.console import Console

    aside = json_path == STDOUT
    console = Console(stderr=aside, markup=False, emoji=False)
    narrow = console.is_terminal or "COLUMNS" in os.environ
    return console if narrow else Console(width=width, stderr=aside, markup=False, emoji=False)


class _Output:
    """Standard output or error: what is written after its reader has gone is dropped.

    So `evoplan plan ... | head -1` does its work and exits as it would have.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of it, to whoever reads."""
        self._to_reader(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Now."""
        self._to_reader(self._stream.flush)

    def _to_reader(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BrokenPipeError:
            self._drop()
        except OSError as error:  # a full disk is said, but only once
            self._drop()
            raise OSError(error.errno, error.strerror, self._stream.name) from None

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def _readers_may_go() -> Iterator[None]:
    """Standard output and error as `_Output`."""
    before = sys.stdout, sys.stderr
    # None where it was closed from the start.
    ours: list[Any] = [None if stream is None else _Output(stream) for stream in before]
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> None:
    """Run a command: one line per error, exit codes 2 (bad input), 3 (no plan fits), 1 (a check failed).

    Steps are timed and run with the allocator in the same state, whichever command does it.
    """
    keep_freed_memory()
    with _readers_may_go():
        try:
            try:
                command.main(args=arguments, prog_name=name, standalone_mode=False)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # a full disk is said
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help())
        except Exception as error:
            line, code = _ending(error, name)
            click.echo(f"{name}: {' '.join(line.split())}", err=True)
            sys.exit(code)


def _ending(error: Exception, name: str) -> tuple[str, int]:
    """What a command that failed says, and its exit code; what nobody expects is raised again."""
    if isinstance(error, click.ClickException):
        return f"{error.format_message()} (see {name} --help)", BAD_INPUT
    if isinstance(error, click.exceptions.Abort):
        return "interrupted", 130
    if isinstance(error, RunError):
        return str(error), CHECK_FAILED
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("can't allocate memory", "out of memory"))
    ):
        return NO_MEMORY, CHECK_FAILED
    if not isinstance(error, ValueError | OSError):
        raise error
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        return where + first["msg"].removeprefix("Value error, "), BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, BAD_INPUT
    return str(error), INFEASIBLE if hasattr(error, "least_feasible_bytes") else BAD_INPUT
