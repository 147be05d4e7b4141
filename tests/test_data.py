"""The rows that a step gets, and what they are to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evoplan.model import InputShape, TrunkConfig
from evoplan.model.data.alignment import POSITION_BYTES, TOKENS, Alignment
from evoplan.model.data.batch import random_alignment
from evoplan.model.data.clusters import summarise
from evoplan.model.families import preset
from evoplan.planner.problems.problem import Problem, shape_for_alignment
from evoplan.planner.runs.data import alignment_for, batch_for
from tests.conftest import TINY, TINY_EXTRA

TRUNK = TrunkConfig(TINY_EXTRA, TINY)


def problem(config=TINY, n_seq: int = 5, n_res: int = 11, n_extra: int | None = None) -> Problem:
    return Problem(model="custom", config=config, shape=InputShape(n_seq, n_res, n_extra=n_extra))


def rows_of(alignment: Alignment, tokens: torch.Tensor) -> list[int]:
    """Where in the alignment, whose rows all differ, these rows are."""
    known = {tuple(row): index for index, row in enumerate(alignment.tokens.tolist())}
    return [known[tuple(row)] for row in tokens[0].tolist()]


@pytest.fixture
def alignment() -> Alignment:
    a = random_alignment(30, 11, 0)
    a.tokens[1:] = np.random.default_rng(0).integers(0, 22, (29, 11))  # no two rows alike
    return a


def test_the_main_stack_gets_clusters(alignment: Alignment) -> None:
    batch = batch_for(problem(), alignment, seed=1)
    centres = rows_of(alignment, batch["targets"])
    assert centres[0] == 0
    assert len(centres) == 5
    assert centres == sorted(set(centres))
    assert batch["deletions"][0].tolist() == alignment.deletions[centres].tolist()
    others = np.setdiff1d(np.arange(30), centres)
    profile, _ = summarise(
        batch["tokens_in"][0].numpy(),
        alignment.deletions[centres],
        alignment.tokens[others],
        alignment.deletions[others],
    )
    np.testing.assert_array_equal(batch["profile"][0, ..., :-1], profile)
    assert "extra_tokens" not in batch


def test_the_extra_stack_alone_gets_rows(alignment: Alignment) -> None:
    batch = batch_for(problem(TINY_EXTRA, n_seq=30), alignment, seed=1)
    assert rows_of(alignment, batch["targets"]) == list(range(30))
    assert batch["is_masked"].any()
    assert "profile" not in batch


def test_a_trunks_extra_rows_are_no_centres(alignment: Alignment) -> None:
    batch = batch_for(problem(TRUNK, n_extra=9), alignment, seed=1)
    centres, extra = rows_of(alignment, batch["targets"]), rows_of(alignment, batch["extra_tokens"])
    assert (len(centres), len(extra)) == (5, 9)
    assert not set(centres) & set(extra)
    assert extra == sorted(set(extra))
    assert batch["extra_deletions"][0].tolist() == alignment.deletions[extra].tolist()
    whole = batch_for(problem(TRUNK, n_extra=25), alignment, seed=1)
    assert sorted(centres + rows_of(alignment, whole["extra_tokens"])) == list(range(30))


def test_batches_are_a_function_of_the_seed(alignment: Alignment) -> None:
    asked = problem(TRUNK, n_extra=9)
    first, again, other = (batch_for(asked, alignment, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("targets", "extra_tokens", "is_masked"):
        assert not torch.equal(first[name], other[name])


def test_deep_files_are_sampled_and_others_kept(
    alignment: Alignment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "family.a3m"
    lines = ("".join(TOKENS[token] for token in row) for row in alignment.tokens)
    path.write_text("".join(f">{index}\n{line}\n" for index, line in enumerate(lines)))
    asked = problem(TRUNK, n_extra=9)
    assert alignment_for(asked, str(path), 0).n_seq == 30
    for pool_rows, kept in ((3, 14), (20, 20), (50, 30)):
        monkeypatch.setattr("evoplan.planner.runs.data.POOL_BYTES", pool_rows * 11 * POSITION_BYTES)
        found = alignment_for(asked, str(path), 0)
        assert found.n_seq == kept
        batch = batch_for(asked, found, 0)
        assert batch["targets"].shape == (1, 5, 11)
        assert batch["extra_tokens"].shape == (1, 9, 11)
    for other, says in (
        (replace(asked.shape, n_res=12), "residues, the plan is for 14 of 12"),
        (replace(asked.shape, n_extra=26), "30 sequences, the plan is for 31"),
    ):
        with pytest.raises(ValueError, match=says):
            alignment_for(asked.model_copy(update={"shape": other}), str(path), 0)


def test_shapes_that_a_file_allows(alignment: Alignment, tmp_path: Path) -> None:
    path = tmp_path / "family.a3m"
    path.write_text(">q\nACDEF\n" + ">b\nAC-EF\n" * 11)

    def shape(model: str, n_seq: int | None = None, n_extra: int | None = None) -> tuple:
        found = shape_for_alignment(preset(model).shape, str(path), n_seq, n_extra)
        return found.n_seq, found.n_res, found.n_extra

    for model in ("alphafold2", "alphafold2-extra"):
        assert shape(model) == (12, 5, None)
        assert shape(model, n_seq=5) == (5, 5, None)
        assert shape(model, n_seq=50) == (12, 5, None)
    assert shape("alphafold2-trunk", n_seq=4) == (4, 5, 8)
    assert shape("alphafold2-trunk", n_seq=4, n_extra=3) == (4, 5, 3)
    assert shape("alphafold2-trunk", n_seq=10, n_extra=30) == (10, 5, 2)
    path.write_text(">q\nACDEF\n" + ">b\nAC-EF\n" * 2000)
    assert shape("alphafold2-trunk") == (128, 5, 1024)


def test_random_data_has_the_problems_shape() -> None:
    a = alignment_for(problem(TRUNK, n_extra=9), None, 0)
    assert (a.n_seq, a.n_res) == (14, 11)
