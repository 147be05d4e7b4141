"""Alignments in memory: read whole, sampled from a file of any depth, or only counted. Free of torch.

A file is read in one pass, one sequence at a time; what a function does not keep takes no memory. (Rows of
Stockholm may be wrapped into blocks: such a file is in memory while it is read.)

With `skip_bad` bad sequences are left out, and `report` is called with one line that says how many and why.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from evoplan.model.config import InputShape
from evoplan.model.data.alignment_file import open_records, shown
from evoplan.model.data.alphabet import (
    AMINO_ACIDS,
    EITHER_CASE_CODES,
    GAP,
    INSERTED,
    MASK,
    N_TOKENS,
    PADDING,
    TOKENS,
    UNKNOWN,
    decoded,
)
from evoplan.model.data.nucleic import Nucleic
from evoplan.model.data.records import AlignmentError, BadRecord, BadRecords, Problem, Record

__all__ = [
    "AMINO_ACIDS",
    "GAP",
    "MASK",
    "N_TOKENS",
    "TOKENS",
    "UNKNOWN",
    "Alignment",
    "AlignmentError",
    "SkippedWarning",
    "alignment_shape",
    "read_alignment",
    "sample_alignment",
    "warn_skipped",
]

POSITION_BYTES = 5  # of an Alignment: a token and a count


@dataclass(frozen=True, eq=False)
class Alignment:
    """Rows of related sequences over the residues of the first, the query.

    names: one per row, the header without '>'. tokens: uint8 [n_seq, n_res], indices into `TOKENS`.
    deletions: int32 [n_seq, n_res], how many residues of the row were left out directly before this column
    (Suppl. Table 1: deletions to the left of every position; what follows the last column is not counted).
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    deletions: np.ndarray

    @property
    def n_seq(self) -> int:
        return len(self.tokens)

    @property
    def n_res(self) -> int:
        return int(self.tokens.shape[1])


class SkippedWarning(UserWarning):
    """Says what `skip_bad` left out."""


def warn_skipped(text: str) -> None:
    """Warn of what was left out."""
    warnings.warn(text, SkippedWarning, stacklevel=5)  # where the file is asked for


class _Row(NamedTuple):
    name: str
    tokens: np.ndarray  # uint8 [n_res]
    deletions: np.ndarray  # int32 [n_res]


def read_alignment(
    path: str | os.PathLike[str],
    max_sequences: int | None = None,
    skip_bad: bool = False,
    report: Callable[[str], object] = warn_skipped,
) -> Alignment:
    """Read a file in A3M, aligned FASTA or Stockholm format, at most its first `max_sequences` good rows.

    The first sequence is the query, and its residues are the columns. Where it has a gap, the column is
    dropped, and what other rows have there is counted as an insertion, as HH-suite's `reformat.pl -M first`
    does. B, Z and U are read as D, E and C; J and O as X. A file compressed with gzip is decompressed on the
    way.

    - A3M: upper-case letters and '-' are columns; lower-case letters and '.' are insertions between them.
      Comments (#) before the first header, blank lines, and HH-suite's secondary-structure rows (ss_pred and
      the like) are passed over.
    - Aligned FASTA: a row with another number of columns, but as many characters as the query, is read
      character by character: every dot is a gap, and lower-case letters may stand where the query has a gap.
    - Stockholm: every character is a column, a dot is a gap, case means nothing, and mark-up is passed over.
      Biopython reads it (the extra `alignments`).

    Args:
        skip_bad: leave out sequences with characters that no alignment has, with another number of columns
            than the query, with no characters, or with a header that is no text. Also drop the null byte that
            ends an entry of an mmseqs or ColabFold database, and what follows it; and read a query without
            upper-case letters as upper-case. Any other fault of the query is an error all the same.
        report: called once, where something was not read as it stands; by default a SkippedWarning.

    Raises:
        AlignmentError: the file cannot be read as an alignment of proteins; RNA and DNA cannot (nucleic.py).
        ValueError: max_sequences is below 1.
    """
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"max_sequences must be at least 1, not {max_sequences!r}")
    with _opened(path, skip_bad, report) as (query, kept, others):
        others = islice(others, None if max_sequences is None else max_sequences - 1)
        return _stacked([_row(query, kept), *(_row(record, kept) for record in others)])


def sample_alignment(
    path: str | os.PathLike[str],
    n_seq: int,
    seed: int,
    pool_bytes: int = 0,
    skip_bad: bool = False,
    report: Callable[[str], object] = warn_skipped,
) -> Alignment:
    """The query and a random choice of the other rows, in their order; every choice is equally likely.

    One pass (Vitter's algorithm R) that keeps `n_seq` rows, or more while they take at most `pool_bytes`; a
    file that is not deeper is kept whole. What is not kept is checked all the same.

    Args:
        skip_bad, report: as for `read_alignment`.

    Raises AlignmentError and ValueError as `read_alignment` does.
    """
    if n_seq < 1:
        raise ValueError(f"n_seq must be at least 1, not {n_seq!r}")
    generator = np.random.default_rng(seed)
    with _opened(path, skip_bad, report) as (query, kept, others):
        places = max(n_seq, pool_bytes // (POSITION_BYTES * int(kept.sum()))) - 1
        pool: list[tuple[int, _Row]] = []
        for index, record in enumerate(others):
            place = index if index < places else int(generator.integers(index + 1))
            if place < places:
                pool[place : place + 1] = [(index, _row(record, kept))]
        pool.sort(key=lambda entry: entry[0])
        return _stacked([_row(query, kept), *(row for _, row in pool)])


def alignment_shape(
    path: str | os.PathLike[str], skip_bad: bool = False, report: Callable[[str], object] = warn_skipped
) -> InputShape:
    """How many sequences and residues a file holds; all of it is checked, nothing is kept.

    Args:
        skip_bad, report: as for `read_alignment`; the sequences that are left out do not count.

    Raises AlignmentError as `read_alignment` does.
    """
    with _opened(path, skip_bad, report) as (_, kept, others):
        return InputShape(1 + sum(1 for _ in others), int(kept.sum()))


@contextmanager
def _opened(
    path: str | os.PathLike[str], skip_bad: bool, report: Callable[[str], object]
) -> Iterator[tuple[Record, np.ndarray, Iterator[Record]]]:
    """The query, which of the file's columns hold a residue of it (bool [columns]), and the other records."""
    bad = BadRecords(skip_bad)
    with open_records(path, bad) as records:
        query = _query(records, bad)
        kept = query.codes[query.codes != PADDING] != GAP
        if not kept.any():
            raise Problem(f"the query, {query}, has no residues; put the query's sequence first")
        nucleic = Nucleic(query.text)
        yield query, kept, _fitting(records, query, len(kept), bad, nucleic)
        if nucleic.found:
            raise Problem(
                f"the query, {query}, and what is aligned to it are RNA or DNA (A, C, G, T, U), not protein; "
                "give an alignment of proteins"
            )
    summary = bad.summary()
    if summary:
        report(f"{shown(path)}: {summary}")


def _query(records: Iterator[Record], bad: BadRecords) -> Record:
    """The first record, its residues in upper case."""
    query = next(records, None)
    if query is None:
        raise Problem("is empty or holds no sequence; give an alignment in A3M, FASTA or Stockholm format")
    if INSERTED not in query.codes:
        return query
    if (query.codes <= UNKNOWN).any():
        raise Problem(
            f"the query, {query}, has lower-case letters, which stand for insertions, but its residues are "
            "the columns; write them in upper case"
        )
    if not bad.skip:
        raise Problem(
            f"the query, {query}, has lower-case letters only, which stand for insertions, but its residues "
            "are the columns; write them in upper case, or add --skip-bad to read them so"
        )
    bad.note(f"the query, {query}, is in lower case, and was read as upper case")
    return query._replace(codes=decoded(query.text, EITHER_CASE_CODES))


def _fitting(
    records: Iterator[Record], query: Record, n_columns: int, bad: BadRecords, nucleic: Nucleic
) -> Iterator[Record]:
    """The records that have as many columns as the query, in A3M's codes."""
    for record in records:
        found = int(np.count_nonzero(record.codes < N_TOKENS))
        if found != n_columns:
            codes = _read_by_position(record.codes, query.codes)
            if codes is None:
                bad.judge(_misfit(record, found, n_columns), record.name, record.line, query=False)
                continue
            record = record._replace(codes=codes)
        nucleic.add(record.text)
        yield record


def _read_by_position(codes: np.ndarray, query: np.ndarray) -> np.ndarray | None:
    """A row of aligned FASTA in A3M's codes; None where it is none.

    Args:
        codes, query: of a row and of the query, uint8 [characters].
    """
    if len(codes) != len(query) or ((codes == INSERTED) & (query <= UNKNOWN)).any():
        return None
    codes = np.where(codes == PADDING, GAP, codes)
    codes[(codes == INSERTED) & (query == GAP)] = UNKNOWN  # a column that is dropped and counted
    return np.where(query != PADDING, codes, np.where(codes == GAP, PADDING, INSERTED))


def _misfit(record: Record, found: int, n_columns: int) -> BadRecord:
    dots = " ('.' stands for an insertion; write gaps as '-')" if PADDING in record.codes else ""
    return BadRecord(
        f"{record} has {found} aligned columns where the query has {n_columns}{dots}; "
        "align the sequences first, for example with hhblits or mafft",
        "another number of columns than the query",
    )


def _row(record: Record, kept: np.ndarray) -> _Row:
    is_column = record.codes < N_TOKENS
    tokens = record.codes[is_column]
    left_out = record.codes == INSERTED
    left_out[is_column] = ~kept & (tokens != GAP)
    left_of_column = np.cumsum(left_out, dtype=np.int32)[is_column][kept]
    return _Row(record.name, tokens[kept], np.diff(left_of_column, prepend=np.int32(0)))


def _stacked(rows: list[_Row]) -> Alignment:
    names, tokens, deletions = zip(*rows, strict=True)
    return Alignment(names, np.stack(tokens), np.stack(deletions))
