"""What README.md and the pages of docs/ show that can be run: Python, files and commands.

A comment before a block says what the block does not show:

    <!-- slow -->            it runs with the slow tests, and all that follows on the page with it
    <!-- run -->             the commands of the block are not only parsed
    <!-- run slow -->        the same, with the slow tests
    <!-- printed -->         what the page's Python prints, times apart; held against it with the slow tests
    <!-- file: NAME -->      the block is a file of that name; commands of the page find it
    <!-- before ... -->      Python, from the next line on, that runs before the block and is not shown;
                             `before slow`: with the slow tests
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
_COMMENT = re.compile(r"<!--(?P<said>(?:(?!-->).)*)-->\n$", re.S)
_INDENTED = re.compile(r"(?:^|\n\n)((?: {4}.*\n|\n)+)")
_SPAN = re.compile(r"`([^`]+)`")
_PROGRAM = re.compile(r"(?:evoplan|make|torchrun|pip|python3?|\.venv/bin/(?:pip|python))(?: |$)")
_COMMANDS = "plan|run|verify|sweep|show|profile|roofline|certify|inspect"
_SHORT = re.compile(rf"(?:{_COMMANDS}) --")

# What stands for something of the reader's own.
_STANDS_FOR = {
    "FILE": "file", "DIR": "folder", "SIZE": "1GiB", "K": "3", "N": "2", "COMMAND": "plan", "SOLVER": "dp",
    "NAME": "dp", "NAME,...": "dp", "B": "4", "SEED:INDEX": "0:1",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: of its first line of code in the page, from 0.
        comment: what the comment before it says, and the line that it begins in.
    """

    language: str
    code: str
    line: int
    comment: tuple[str, int]

    @property
    def said(self) -> str:
        return self.comment[0].strip()

    @property
    def slow(self) -> bool:
        return "slow" in self.said.partition("\n")[0].split()


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for match in _FENCE.finditer(text):
        comment = _COMMENT.search(text, 0, match.start())
        said = ("", 0) if comment is None else (comment["said"], text.count("\n", 0, comment.start()))
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match["language"], textwrap.dedent(match["code"]), line, said)


def script(text: str, slow: bool) -> str:
    """The Python of a page as one file, each line where the page has it, so that an error names the page's.

    Args:
        slow: whether blocks that are marked so are part of it.
    """
    lines = [""] * (text.count("\n") + 1)

    def put(code: str, line: int) -> None:
        own = code.splitlines()
        lines[line : line + len(own)] = own

    for block in blocks(text):
        if block.language != "python":
            continue
        if block.said.startswith("file:"):
            continue
        if block.slow and not slow:
            break
        if block.said.startswith("before"):
            # After the word there is the rest of the comment, from the next line on.
            put(block.said.partition("\n")[2], block.comment[1] + 1)
        put(block.code, block.line)
    code = "\n".join(lines).rstrip() + "\n"
    return code if code.strip() else ""


def files(text: str) -> dict[str, str]:
    """Those that a page has the reader write."""
    named = ((block.said.partition("file:")[2].strip(), block.code) for block in blocks(text))
    return {name: code for name, code in named if name}


def printed(text: str) -> list[str]:
    """Lines that a page says its Python prints, without times."""
    shown = (line for block in blocks(text) if block.said == "printed" for line in block.code.splitlines())
    return [without_times(line) for line in shown]


def without_times(line: str) -> str:
    """A line of a report as it is on any machine."""
    return re.sub(r"[\d.]+(?:e-\d+)? (?:s|ms|us)\b", "-", line).rstrip()


def to_run(text: str, slow: bool) -> list[list[str]]:
    """The commands of a page that a test runs: all of them with the slow tests."""
    wanted = {"run", "run slow"} if slow else {"run"}
    return [command for block in blocks(text) if block.said in wanted for command in _of_lines(block.code)]


def commands(text: str) -> tuple[list[list[str]], list[list[str]]]:
    """Commands of a page, with something in place of FILE and the like: its blocks', and its sentences'.

    In a sentence a command may lack what it is given: `evoplan verify`.
    """
    whole = [c for block in blocks(text) if block.language != "python" for c in _of_lines(block.code)]
    prose = _FENCE.sub("", text)
    whole += [command for part in _INDENTED.findall(prose) for command in _of_lines(textwrap.dedent(part))]
    short = (f"evoplan {span}" if _SHORT.match(span) else span for span in spans(text))
    named = [command for span in short for command in _of_lines(span)]
    return [list(map(_instead, words)) for words in whole], [list(map(_instead, words)) for words in named]


def spans(text: str) -> list[str]:
    """What a page has between backticks within its sentences."""
    prose = re.sub(r"^ {4}.*\n", "", _FENCE.sub("", text), flags=re.M)
    return [" ".join(span.split()) for span in _SPAN.findall(prose)]


def _instead(word: str) -> str:
    return _STANDS_FOR.get(word, word).partition("|")[0]


def _of_lines(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    stripped = (line.strip().removeprefix("$ ").partition(" | ")[0] for line in lines)
    found = (shlex.split(line, comments=True) for line in stripped if _PROGRAM.match(line))
    return [[word for word in words if word != "..."] for words in found]
