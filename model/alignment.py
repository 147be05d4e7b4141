"""Alignments in memory: read whole, sampled from a file of any depth, or only counted. Free of torch.

A file is read in one pass, one sequence at a time; what a function does not keep takes no memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from evoplan.model.a3m import (
    AMINO_ACIDS,
    GAP,
    INSERTED,
    MASK,
    N_TOKENS,
    PADDING,
    TOKENS,
    UNKNOWN,
    AlignmentError,
    Problem,
    Record,
    open_records,
)
from evoplan.model.config import InputShape

__all__ = [
    "AMINO_ACIDS",
    "GAP",
    "MASK",
    "N_TOKENS",
    "TOKENS",
    "UNKNOWN",
    "Alignment",
    "AlignmentError",
    "alignment_shape",
    "read_alignment",
    "sample_alignment",
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
        return self.tokens.shape[0]

    @property
    def n_res(self) -> int:
        return self.tokens.shape[1]


class _Row(NamedTuple):
    name: str
    tokens: np.ndarray  # uint8 [n_res]
    deletions: np.ndarray  # int32 [n_res]


def read_alignment(path: str | os.PathLike[str], max_sequences: int | None = None) -> Alignment:
    """Read an A3M or aligned FASTA file, at most its first `max_sequences` rows; what follows is not read.

    The first sequence is the query, and its residues are the columns. Upper-case letters and '-' are columns;
    lower-case letters and '.' are insertions between them. B, Z and U are read as D, E and C; J and O as X.
    Where an aligned FASTA's query has a gap, the column is dropped, and what other rows have there is counted
    as an insertion, as HH-suite's `reformat.pl -M first` does. Comments (#) before the first header, blank
    lines, and HH-suite's secondary-structure rows (ss_pred and the like) are passed over. A file compressed
    with gzip is decompressed on the way.

    Raises AlignmentError when the file cannot be read as an alignment, and ValueError when max_sequences is
    below 1.
    """
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"max_sequences must be at least 1, not {max_sequences!r}")
    with open_records(path) as records:
        query, kept, others = _started(islice(records, max_sequences))
        return _stacked([_row(record, kept, _columns(record, kept)) for record in chain([query], others)])


def sample_alignment(path: str | os.PathLike[str], n_seq: int, seed: int, pool_bytes: int = 0) -> Alignment:
    """The query and a random choice of the other rows, in their order; every choice is equally likely.

    One pass (Vitter's algorithm R) that keeps `n_seq` rows, or more while they take at most `pool_bytes`; a
    file that is not deeper is kept whole. What is not kept is checked all the same.

    Raises AlignmentError and ValueError as `read_alignment` does.
    """
    if n_seq < 1:
        raise ValueError(f"n_seq must be at least 1, not {n_seq!r}")
    generator = np.random.default_rng(seed)
    with open_records(path) as records:
        query, kept, others = _started(records)
        places = max(n_seq, pool_bytes // (POSITION_BYTES * int(kept.sum()))) - 1
        pool: list[tuple[int, _Row]] = []
        for index, record in enumerate(others):
            is_column = _columns(record, kept)
            place = index if index < places else int(generator.integers(index + 1))
            if place < places:
                pool[place : place + 1] = [(index, _row(record, kept, is_column))]
        pool.sort(key=lambda entry: entry[0])
        return _stacked([_row(query, kept, _columns(query, kept)), *(row for _, row in pool)])


def alignment_shape(path: str | os.PathLike[str]) -> InputShape:
    """How many sequences and residues a file holds; all of it is checked, nothing is kept.

    Raises AlignmentError as `read_alignment` does.
    """
    with open_records(path) as records:
        _, kept, others = _started(records)
        n_seq = 1
        for record in others:
            _columns(record, kept)
            n_seq += 1
        return InputShape(n_seq, int(kept.sum()))


def _started(records: Iterator[Record]) -> tuple[Record, np.ndarray, Iterator[Record]]:
    """The query, which of the file's columns hold a residue of it (bool [columns]), and the other records."""
    query = next(records, None)
    if query is None:
        raise Problem("is empty or holds no sequence; give an alignment in A3M or aligned FASTA format")
    if INSERTED in query.codes:
        raise Problem(
            f"the query, {query}, has lower-case letters, which stand for insertions, but its residues are "
            "the columns; write them in upper case"
        )
    kept = query.codes[query.codes != PADDING] != GAP
    if not kept.any():
        raise Problem(f"the query, {query}, has no residues; put the query's sequence first")
    return query, kept, records


def _columns(record: Record, kept: np.ndarray) -> np.ndarray:
    """Which characters of a row are columns, bool; there must be as many as the query has."""
    is_column = record.codes < N_TOKENS
    found = np.count_nonzero(is_column)
    if found != len(kept):
        dots = " ('.' stands for an insertion; write gaps as '-')" if PADDING in record.codes else ""
        raise Problem(
            f"{record} has {found} aligned columns where the query has {len(kept)}{dots}; "
            "align the sequences first, for example with hhblits or mafft"
        )
    return is_column


def _row(record: Record, kept: np.ndarray, is_column: np.ndarray) -> _Row:
    tokens = record.codes[is_column]
    left_out = record.codes == INSERTED
    left_out[is_column] = ~kept & (tokens != GAP)
    left_of_column = np.cumsum(left_out, dtype=np.int32)[is_column][kept]
    return _Row(record.name, tokens[kept], np.diff(left_of_column, prepend=np.int32(0)))


def _stacked(rows: list[_Row]) -> Alignment:
    names, tokens, deletions = zip(*rows, strict=True)
    return Alignment(names, np.stack(tokens), np.stack(deletions))
