"""README.md and the pages of docs/: their Python runs, their commands are ones that there are."""

from __future__ import annotations

import argparse
import configparser
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

import evoplan
from evoplan.planner.commands.cli import cli
from tests.documents import (
    PAGES,
    ROOT,
    blocks,
    commands,
    files,
    printed,
    script,
    spans,
    to_run,
    without_times,
)  # fmt: skip
from tests.torchrun import alone

# Flags that documents name of programs of others: torchrun, pip, pytest.
OTHERS = {"--nproc_per_node", "--max-restarts"}
FOLDERS = "model|cost_model|planner|experiments|tests|tools|docs|examples"
_PATH = re.compile(rf"(?:{FOLDERS})/[\w./-]*")


def page(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_python_and_marked_commands_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_page(path, tmp_path, monkeypatch, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=page)
def test_slow_blocks_run_too(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    if (script(text, True), to_run(text, True)) == (script(text, False), to_run(text, False)):
        pytest.skip("has no slow blocks")
    check_page(path, tmp_path, monkeypatch, slow=True)


def check_page(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """In a folder of the page's own, where its files lie; first its Python, from top to bottom."""
    text = path.read_text()
    code, asked = script(text, slow), to_run(text, slow)
    if not code and not asked:
        return
    monkeypatch.chdir(folder)
    for name, content in files(text).items():
        (folder / name).write_text(content)
    if code:
        # Under the page's name, so that a traceback has its lines.
        (folder / path.name).write_text(code)
        done = alone(path.name)
        assert done.code == 0, done.err
        if slow:
            lines = {without_times(line) for line in done.out.splitlines()}
            assert not [line for line in printed(text) if line not in lines], done.out
    for words in asked:
        module = ["-m", "evoplan", *words[1:]] if words[0] == "evoplan" else words[1:]
        tool = module[:1] == ["tools/check_certificate.py"]
        done = alone(*([str(ROOT / module[0]), *module[1:]] if tool else module))
        assert done.code == 0, f"{' '.join(words)}\n{done.err}"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_commands_parse(path: Path) -> None:
    whole, named = commands(path.read_text())
    for words in whole:
        parse(words)
    for words in named:
        with suppress(click.MissingParameter, click.BadOptionUsage):
            parse(words)


@pytest.mark.slow
def test_the_first_screen_is_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    shown = next(block.code for block in blocks(text) if "$ evoplan plan" in block.code)
    line, _, lines = shown.replace("\\\n", " ").partition("\n")
    monkeypatch.chdir(tmp_path)
    done = alone("-m", *shlex.split(line.removeprefix("$ ")))
    assert done.code == 0, done.err
    assert [*map(without_times, done.out.splitlines())] == [*map(without_times, lines.splitlines())]


@pytest.mark.slow
def test_the_table_of_strategies_is_what_its_script_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "evoformer-memory.md").read_text()
    (tmp_path / "script.py").write_text(script(text, slow=True))
    monkeypatch.chdir(tmp_path)
    done = alone("script.py")
    assert done.code == 0, done.err
    columns, name, checked = r"\| (?:`(\w+)` )?\| (\w+|\w+\(\w+, 8\)) " + 3 * r"\| ([\d,]+) " + r"\|", "", 0
    for row in re.findall(f"^{columns}$", text.partition("## The extra MSA stack")[0], re.M):
        name = row[0] or name
        assert " ".join((name, *row[1:])) in done.out.splitlines()
        checked += 1
    assert checked > 12


def parse(words: list[str]) -> None:
    """Error where the program does not take these arguments; nothing is run."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets or "=" in word for word in arguments), words
    elif program.endswith("pip"):
        settings = configparser.ConfigParser()
        settings.read(ROOT / "setup.cfg")
        for extra in re.findall(r"\[(\w+)\]", " ".join(arguments)):
            assert extra in settings["options.extras_require"], words
    elif program == "evoplan":
        parse_click(cli, arguments)
    elif "-m" in arguments:
        at = arguments.index("-m")
        parse_module(arguments[at + 1], arguments[at + 2 :])
    elif program != "torchrun":
        assert (ROOT / arguments[0]).is_file(), words


def parse_click(command: click.Command, arguments: list[str]) -> None:
    """As the command would, down to the subcommand, without its work."""
    try:
        with command.make_context("it", list(arguments)) as context:
            if isinstance(command, click.Group):
                _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
                assert inner is not None
                parse_click(inner, rest)
    except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit):
        pass  # its help


def parse_module(name: str, arguments: list[str]) -> None:
    """The same of `python -m name`."""
    spec = find_spec(name)
    assert spec is not None, name
    if not name.startswith("evoplan."):
        return
    if name == "evoplan.planner":
        return parse_click(cli, arguments)
    module = importlib.import_module(name if spec.submodule_search_locations is None else f"{name}.__main__")
    if found := click_commands(module):
        parse_click(next((c for c in found if isinstance(c, click.Group)), found[0]), arguments)
    elif hasattr(module, "argparse"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *arguments])
            patch.setattr(argparse.ArgumentParser, "parse_args", _parse_and_stop)
            with pytest.raises(_ParsedError):
                module.main()
    else:
        assert not [word for word in arguments if word.startswith("-")], f"{name} takes no options"


class _ParsedError(Exception):
    """In place of the work."""


def _parse_and_stop(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
    _, rest = parser.parse_known_args(arguments)
    assert not rest, rest
    raise _ParsedError


def click_commands(module: object) -> list[click.Command]:
    """Those that a module itself defines."""
    found = (value for value in vars(module).values() if isinstance(value, click.Command))
    return [c for c in found if c.callback is not None and c.callback.__module__ == module.__name__]


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_flags_and_files_exist(path: Path, own_flags: set[str]) -> None:
    """What stands between backticks: `--ranks N`, `planner/solvers/dp.py`, `tests/test_loops.py`."""
    for span in spans(path.read_text()):
        if flag := re.match(r"--[a-z][\w-]*", span):
            assert flag[0] in own_flags | OTHERS, f"{path.name}: no program takes {flag[0]}"
        if _PATH.fullmatch(span) and "." in span.rpartition("/")[2] + "/" * span.endswith("/"):
            assert any(ROOT.glob(span.rstrip("/"))), f"{path.name}: there is no {span}"


@pytest.fixture(scope="module")
def own_flags() -> set[str]:
    """Of all commands, and of the experiments that documents name."""
    found: set[str] = set()
    for _, _, command in walked(cli):
        found |= {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    for file in (ROOT / "cost_model" / "analytic.py", *(ROOT / "experiments").rglob("*.py")):
        found |= set(re.findall(r"(?<=[\"/])--[a-z][\w-]*(?=[\"/])", file.read_text()))
    return found


def walked(command: click.Command, path: str = "") -> Iterator[tuple[str, str, click.Command]]:
    """A command and all below it."""
    yield path, command.name or "", command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walked(inner, f"{path} {name}")


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_lead_somewhere(path: Path) -> None:
    """To files, and to headings in them; `make docs` sees the same of the site."""
    for link in re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), f"{path.name}: there is no {link}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            known = {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}
            assert heading in known, f"{path.name}: {name} has no heading {heading}"


def test_the_api_page_has_all_that_is_offered() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"heading: evoplan\.(\w+)", text)) == set(evoplan.__all__)


@pytest.mark.parametrize("name", evoplan.__all__)
def test_docstrings_name_every_argument(name: str) -> None:
    """Of functions, of what plans are asked for, and of what constructors and stacks are given."""
    if name in ("LightningFit", "TransformersFit"):
        pytest.importorskip(name.removesuffix("Fit").lower())
    offered = getattr(evoplan, name)
    said = inspect.getdoc(offered)
    assert said
    if inspect.isfunction(offered):
        check_arguments(name, offered, said)
        return
    for method, function in vars(offered).items():
        public = name == "Fitted" and not method.startswith("_")
        if inspect.isfunction(function) and (public or method == "prepare"):
            check_arguments(f"{name}.{method}", function, f"{said}\n{inspect.getdoc(function)}")
    if name.endswith("Config") or name == "InputShape":
        check_arguments(name, offered, said)


def check_arguments(name: str, function: Callable[..., object], said: str) -> None:
    arguments = inspect.signature(function).parameters.keys() - {"self"}
    missing = sorted(a for a in arguments if not re.search(rf"\b{a}\b", said))
    assert not missing, f"the docstring of {name} does not say what {', '.join(missing)} is"
