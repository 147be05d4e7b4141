"""Parses A3M and aligned FASTA files, one sequence after the other. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from evoplan.model.data.alphabet import A3M_CODES, decoded
from evoplan.model.data.records import (
    BadRecord,
    BadRecords,
    Problem,
    Record,
    binary,
    check_row,
    not_text,
    quoted,
)

MAX_LINE = 1 << 24  # characters; no protein is longer, and a file without line ends must not fill memory
_ANNOTATIONS = ("ss_pred", "ss_conf", "ss_dssp", "sa_dssp")  # rows of HH-suite that are not sequences


def parse_a3m(lines: Iterable[tuple[int, bytes]], bad: BadRecords) -> Iterator[Record]:
    """The sequences in order, without annotations and those that `bad` leaves out.

    Args:
        lines: their numbers and content, without line ends.

    Raises:
        Problem: these are no sequences, or a bad one is not left out.
    """
    draft: _Draft | None = None
    for number, line in lines:
        if line.startswith(b">"):
            if draft is not None:
                yield from draft.finished()
            draft = _Draft(number, line, bad)
        elif draft is not None:
            draft.add(number, line)
        elif b"\0" in line:
            raise Problem(str(binary(number)))
        elif not line.startswith(b"#"):
            raise Problem(
                f"line {number}: no '>' header before the first sequence, so this is neither A3M nor FASTA; "
                "put a line with '>' and a name above each sequence"
            )
    if draft is not None:
        yield from draft.finished()


class _Draft:
    """The sequence that is being read: a header, and the rows below it."""

    def __init__(self, number: int, header: bytes, bad: BadRecords) -> None:
        self.name = header[1:].decode(errors="replace").strip()
        self.line = number
        self._bad = bad
        self._is_annotation = self.name.partition(" ")[0] in _ANNOTATIONS
        self._is_left_out = False
        self._rows: list[bytes] = []
        self._length = 0
        if b"\0" in header:
            self._judge(binary(number))
        elif not _is_text(header):
            self._judge(not_text(number))

    def add(self, number: int, row: bytes) -> None:
        if self._is_annotation or self._is_left_out:
            return
        self._length += len(row)
        if self._length > MAX_LINE:
            raise Problem(
                f"line {number}: sequence {quoted(self.name)} is over {MAX_LINE} characters; "
                "check that this is an alignment"
            )
        try:
            check_row(number, row, self.name)
            self._rows.append(row)
        except BadRecord as problem:
            self._judge(problem)

    def finished(self) -> Iterator[Record]:
        """The record; none where it is an annotation or was left out."""
        if self._is_annotation:
            return
        if not self._rows and not self._is_left_out:
            self._judge(
                BadRecord(
                    f"line {self.line}: header {quoted(self.name)} has no sequence below it; "
                    "add it or delete the header",
                    "no sequence below the header",
                )
            )
        self._bad.seen += 1
        if not self._is_left_out:
            text = b"".join(self._rows)
            yield Record(self.name, self.line, text, decoded(text, A3M_CODES))

    def _judge(self, problem: BadRecord) -> None:
        self._bad.judge(problem, self.name, self.line, query=self._bad.seen == 0)
        self._is_left_out = True


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
