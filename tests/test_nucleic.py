"""RNA and DNA are refused; proteins of few kinds of residues are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evoplan.model.data.alignment import read_alignment
from tests.alignments import letters, message, read_with_report

Write = Callable[[str | bytes], Path]

RNA = "are RNA or DNA (A, C, G, T, U), not protein"


@pytest.mark.parametrize(
    "rows",
    [
        ["ACGUACGU", "ACGU-CGU"],
        ["ACGTACGTAA"],
        ["GGGAAACUCUGCNNNXX", "GGGAA-CUCUGCACGUX", "GGGAAaacACUCUGC--GUU"],
        ["ATATTAATACATATGATTATTAATATCATTAA"],  # few G and C
        ["ACGTACGTACGTACGTACGTACGTACGTACGTACGTACGTR"],  # a purine that was not resolved
    ],
)
def test_nucleotides_are_refused(file: Write, rows: list[str]) -> None:
    path = file("".join(f">s{i}\n{row}\n" for i, row in enumerate(rows)))
    for skip_bad in (False, True):
        assert f"the query, sequence 's0' (line 1), and what is aligned to it {RNA}" in message(
            path, skip_bad=skip_bad
        )
    assert RNA in message(path, max_sequences=1)


def test_lower_case_nucleotides_are_refused_too(file: Write) -> None:
    assert RNA in message(file(">q\nacguacguu\n>h\nACGUACGUU\n"), skip_bad=True)


@pytest.mark.parametrize(
    "rows",
    [
        ["ACGTAGT"],  # seven letters say nothing yet
        ["AAAAA"],
        ["AAAAAAAAAAAAAAAAAAAA"],
        ["AATAATAATAATAATAATAATAAT"],  # antifreeze glycoprotein
        ["GAGAGAGAGAGAGTGAGAGAGAGA"],  # fibroin
        ["MDPNCSCATGGSCTCTGSCKCKECKCTSCKKSCCSCCPVGCAKCAQGCICKGASDKCSCCA"],  # metallothionein
        ["NNNNNNNNNNACGTNNNNNNNNNN"],
        ["XXXXXXXXXXXX"],
        ["ACGTACGTACGTACGTACGTMK"],  # 2 of 22 letters are others
        ["ACGTACGTACGT", *["MKVLAWDEFHIK"] * 9],  # a short peptide, and proteins
    ],
)
def test_proteins_are_read(file: Write, rows: list[str]) -> None:
    a, said = read_with_report(file("".join(f">s{i}\n{row}\n" for i, row in enumerate(rows))))
    assert letters(a) == rows
    assert said == ""


def test_selenocysteine_is_read_as_cysteine(file: Write) -> None:
    assert letters(read_alignment(file(">q\nMKUUAACGT\n"))) == ["MKCCAACGT"]
