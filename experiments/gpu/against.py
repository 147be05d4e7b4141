"""Plans against `large` and `small`, with and without faster kernels, at equal measured peaks."""

from __future__ import annotations

from functools import partial

from evoplan.experiments.benchmark import run_size
from evoplan.experiments.gpu.setting import PRECISIONS, Row, Runs, Setting, Size, free_up, named
from evoplan.planner.commands.terminal import progress

BY_HAND = ("large", "small", "large+kernels", "small+kernels")


def runs(setting: Setting) -> Runs:
    """Every size in both precisions."""
    return {
        f"{precision} {named(size)}": partial(timed, setting, size, precision)
        for size in setting.sizes.against
        for precision in PRECISIONS
    }


def timed(setting: Setting, size: Size, precision: str) -> Row:
    """All schedules of one size, interleaved; times of steps are measured first, for the plans."""
    free_up()
    sizes = setting.sizes
    with progress("measuring") as say:
        return run_size(
            setting.problem(size, precision), setting.cache, sizes.rounds, False, say,
            names=BY_HAND, repeats=sizes.repeats, max_pieces=sizes.pieces,
        )  # fmt: skip


def in_words(row: Row) -> str:
    """A line for people."""
    return "; ".join(
        f"{one['plan']}: {one['time_ratio']:.3f} of its time ({one['quartiles'][0]:.3f} to "
        f"{one['quartiles'][1]:.3f}), {one['peak_ratio']:.3f} of its peak"
        for one in row["comparisons"]
    )
