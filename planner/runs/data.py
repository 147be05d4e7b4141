"""What a plan's steps are fed with: a real alignment, a choice of its rows for every step, or random data."""

from __future__ import annotations

from collections.abc import Callable

from evoplan.model.build import program_type
from evoplan.model.data.alignment import Alignment, sample_alignment, warn_skipped
from evoplan.model.data.batch import Batch, random_alignment
from evoplan.planner.problems.problem import Problem

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
    needed = (shape.n_seq or 1) + (shape.n_extra or 0)
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
    """One step's batch, on the CPU; the same seed makes the same one (see the model's program)."""
    return program_type(problem.config).draw(problem.config, problem.shape, alignment, seed)
