"""Parses Stockholm files with Biopython's reader. Free of torch.

Every character is a column there: a dot or '-' is a gap, and lower-case letters are residues like the others.
Rows may be wrapped into blocks, so the whole alignment is read into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from evoplan.model.data.alphabet import A3M_CODES, EITHER_CASE_CODES, ILLEGAL, decoded
from evoplan.model.data.records import BadRecord, BadRecords, Problem, Record, check_row, not_text

STOCKHOLM = b"# STOCKHOLM"
_END = b"//"


def parse_stockholm(lines: Iterable[tuple[int, bytes]], bad: BadRecords) -> Iterator[Record]:
    """The sequences of the first alignment, in order, without those that `bad` leaves out.

    Args:
        lines: their numbers and content, without line ends and blank lines.

    Raises:
        Problem: no Biopython, no alignment, or a bad sequence that is not left out.
    """
    try:
        from Bio import AlignIO
    except ImportError:
        raise Problem(
            "is in Stockholm format, which Biopython reads; install it: pip install 'evoplan[alignments]'"
        ) from None
    rows = _Rows(lines)
    try:
        alignment = next(AlignIO.parse(rows, "stockholm"), ())
    except ValueError as error:
        why = " ".join(str(error).split())
        raise Problem(f"line {rows.number}: no valid Stockholm format ({why}); check the file") from None
    _check_end(rows, bad)
    for row, found in zip(alignment, rows.found.values(), strict=True):
        if found.problem is not None:
            bad.judge(found.problem, found.name, found.line, query=bad.seen == 0)
        bad.seen += 1
        if found.problem is None:
            text = bytes(row.seq)  # with '-' for dots
            yield Record(found.name, found.line, text, decoded(text, EITHER_CASE_CODES))


def _check_end(rows: _Rows, bad: BadRecords) -> None:
    """There must be an end, and nothing after it; with --skip-bad it is said where that is not so."""
    after = None
    if not rows.is_complete:
        after = "the line '//' that ends an alignment is missing, so sequences may be, too"
    elif rows.has_more():
        after = f"line {rows.number}: a second alignment follows"
    if after and not bad.skip:
        raise Problem(f"{after}; give one whole alignment, or add --skip-bad to read what comes before")
    if after:
        bad.note(f"{after}, and was not read" if rows.is_complete else after)


@dataclass
class _Found:
    """A sequence, the line of its first row, and what is wrong with one of its rows."""

    name: str
    line: int
    problem: BadRecord | None = None


class _Rows:
    """A file for Biopython: one alignment's header, rows and end, without mark-up. Knows what is where.

    Rows are named by numbers, so that no name is taken for something else.

    Attributes:
        number: of the line that was read last.
        found: the sequences, by the bytes of their names.
        is_complete: the alignment's end was read.
    """

    def __init__(self, lines: Iterable[tuple[int, bytes]]) -> None:
        self._lines = iter(lines)
        self.number = 0
        self.found: dict[bytes, _Found] = {}
        self._places: dict[bytes, int] = {}
        self.is_complete = False

    def readline(self) -> str:
        """The next line, with its end; empty after the alignment's end."""
        if self.is_complete:
            return ""
        for number, line in self._lines:
            self.number = number
            if line == _END:
                self.is_complete = True
            elif not line.startswith(b"#"):
                return self._row(line)
            elif not line.startswith(STOCKHOLM):
                continue
            return line.decode(errors="replace") + "\n"
        return ""

    def has_more(self) -> bool:
        """Whether anything but comments follows the end."""
        for number, line in self._lines:
            self.number = number
            if line.startswith(STOCKHOLM) or not line.startswith(b"#"):
                return True
        return False

    def _row(self, line: bytes) -> str:
        """A row; what is wrong with it is noted, and X stands for it so that the others can be read."""
        name, *rest = line.split(None, 1)
        if not rest:
            raise Problem(f"line {self.number}: no name and row with a space between them; check the file")
        place = self._places.setdefault(name, len(self._places))
        found = self.found.setdefault(name, _Found(name.decode(errors="replace"), self.number))
        if found.problem is None:
            found.problem = _problem(self.number, name, rest[0], found.name)
        row = rest[0]
        if found.problem is not None:
            row = bytes(ord("X") if A3M_CODES[byte] == ILLEGAL else byte for byte in row)
        return f"{place} {row.decode()}\n"


def _problem(number: int, name: bytes, row: bytes, shown: str) -> BadRecord | None:
    try:
        name.decode()
        check_row(number, row, shown)
    except UnicodeDecodeError:
        return not_text(number)
    except BadRecord as problem:
        return problem
    return None


def is_stockholm(lines: Iterator[tuple[int, bytes]]) -> tuple[bool, Iterator[tuple[int, bytes]]]:
    """Whether the first line says so, and all lines."""
    first = next(lines, None)
    if first is None:
        return False, lines
    return first[1].startswith(STOCKHOLM), chain([first], lines)
