"""The list of mutants fits the tree; `make mutants` tries them."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_put_in(mutant: Mutant) -> None:
    compile(mutated(mutant, ROOT), mutant.file, "exec")
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / "tests" / f"test_{file}").read_text()
        assert f"def {name}" in text


def test_names_are_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
