"""What a plan's steps are fed with: a real alignment, a choice of its rows for every step, or random data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evoplan.model.alignment import Alignment, sample_alignment, warn_skipped
from evoplan.model.batch import Batch, Rows, extra_rows, mask_msa, random_alignment
from evoplan.model.masked_msa import embeds_clusters
from evoplan.planner.problem import Problem

# Rows to choose from at every step. A deeper alignment is sampled once, in the one pass that reads it.
POOL_BYTES = 16 * 2**20


def alignment_for(
    problem: Problem,
    msa: str | None,
    seed: int,
    skip_bad: bool = False,
    report: Callable[[str], object] = warn_skipped,
) -> Alignment:
    """Rows to choose from: all of an alignment, or a random choice where it takes over `POOL_BYTES`.

    Args:
        msa: a file with an alignment; None for random related sequences.
        skip_bad: leave out the file's bad sequences; `report` is told how many and why.

    Raises:
        ValueError: no alignment, too few rows, or not the problem's r.
    """
    shape = problem.shape
    needed = shape.n_seq + (shape.n_extra or 0)
    if msa is None:
        return random_alignment(needed, shape.n_res, seed)
    alignment = sample_alignment(msa, needed, seed, POOL_BYTES, skip_bad, report)
    wrong = None
    if alignment.n_res != shape.n_res:
        wrong = f"sequences of {alignment.n_res} residues, the plan is for {needed} of {shape.n_res}"
    elif alignment.n_seq < needed:
        wrong = f"{alignment.n_seq} sequences, the plan is for {needed}"
    if wrong:
        flag = " --skip-bad" * skip_bad
        raise ValueError(f"{msa}: {wrong}; plan for it with `evoplan plan --msa {msa}{flag}`")
    return alignment


def batch_for(problem: Problem, alignment: Alignment, seed: int) -> Batch:
    """One step's batch, on the CPU; the same seed makes the same one.

    The main stack gets the query and a random choice of the others as cluster centres, whose features sum up
    all other rows; a trunk's extra stack a random choice of those that are no centres (Suppl. 1.2.7). The
    extra stack alone gets rows that are masked, without cluster features.
    """
    shape = problem.shape
    order = np.random.default_rng(seed).permutation(np.arange(1, alignment.n_seq))
    centres, others = np.split(order, [shape.n_seq - 1])
    tokens, deletions = _rows(alignment, np.append(0, centres))
    if not embeds_clusters(problem.config):
        return mask_msa(tokens, deletions, seed, clusters=False)
    batch = mask_msa(tokens, deletions, seed, _rows(alignment, others))
    if shape.n_extra is not None:
        batch |= extra_rows(*_rows(alignment, others[: shape.n_extra]))
    return batch


def _rows(alignment: Alignment, chosen: np.ndarray) -> Rows:
    chosen = np.sort(chosen)
    return alignment.tokens[chosen], alignment.deletions[chosen]
