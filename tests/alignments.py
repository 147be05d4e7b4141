"""What tests of alignments share: their letters, and the one line that an error is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from evoplan.model.config import InputShape
from evoplan.model.data.alignment import (
    TOKENS,
    Alignment,
    AlignmentError,
    alignment_shape,
    read_alignment,
    sample_alignment,
)


def letters(alignment: Alignment) -> list[str]:
    return ["".join(TOKENS[token] for token in row) for row in alignment.tokens]


def message(path: Path | str, max_sequences: int | None = None, skip_bad: bool = False) -> str:
    """The error's message, after checking that it is one line that starts with the file's name."""
    with pytest.raises(AlignmentError) as caught:
        read_alignment(path, max_sequences, skip_bad)
    text = str(caught.value)
    if max_sequences is None:  # what is only counted or sampled is checked as well
        for read in (alignment_shape, partial(sample_alignment, n_seq=1, seed=0)):
            with pytest.raises(AlignmentError) as also:
                read(path, skip_bad=skip_bad)
            assert str(also.value) == text
    assert len(text.splitlines()) == 1
    assert text.startswith(f"{path}: ")
    return text


def read_with_report(path: Path, skip_bad: bool = True) -> tuple[Alignment, str]:
    """The alignment, and what was said of it; counting and sampling must agree with reading."""
    said: list[str] = []
    a = read_alignment(path, skip_bad=skip_bad, report=said.append)
    again: list[str] = []
    assert alignment_shape(path, skip_bad, again.append) == InputShape(a.n_seq, a.n_res)
    assert_same(a, sample_alignment(path, a.n_seq, 0, skip_bad=skip_bad, report=again.append))
    assert again == said * 2
    assert len(said) <= 1
    for text in said:
        assert text.startswith(f"{path}: ")
        assert text.isprintable()  # so it is one line
    return a, "".join(said).removeprefix(f"{path}: ")


def assert_same(a: Alignment, b: Alignment) -> None:
    assert a.names == b.names
    assert (a.tokens == b.tokens).all()
    assert (a.deletions == b.deletions).all()
