"""The parts of the experiment, and running one of them in this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from evoplan.experiments.gpu import against, capped, fidelity, offload, steps
from evoplan.experiments.gpu.results import Results
from evoplan.experiments.gpu.setting import Row, Runs, Setting


@dataclass(frozen=True)
class Part:
    """Some runs whose results are one file.

    Attributes:
        name: of the file.
        runs: of a setting, by name.
        in_words: a line about one of them.
        seconds: that starting it and its first run take on a GPU, about.
        cuda_only: why it is not run elsewhere; None: it is.
        expandable: whether CUDA's allocator has expandable segments.
    """

    name: str
    runs: Callable[[Setting], Runs]
    in_words: Callable[[Row], str]
    seconds: float
    cuda_only: str | None = None
    expandable: bool = False

    def settings(self, setting: Setting) -> Row:
        """What its results depend on."""
        return {**setting.told(), "expandable_segments": self.expandable and setting.device == "cuda"}


def _fidelity(precision: str, expandable: bool) -> Part:
    return Part(
        f"fidelity-{precision}{'-expandable' * expandable}",
        partial(fidelity.runs, precision=precision, numerics=not expandable),
        fidelity.in_words,
        40,
        "expandable segments are a setting of CUDA's allocator" if expandable else None,
        expandable,
    )


def _capped(expandable: bool) -> Part:
    return Part(
        f"cap{'-expandable' * expandable}", capped.runs, capped.in_words, 30,
        "only CUDA's allocator can be given a hard cap", expandable,
    )  # fmt: skip


# In the order in which they run: what is short before what fills the time that is left.
PARTS = {
    part.name: part
    for part in (
        _fidelity("fp32", False),
        _fidelity("bf16-mixed", False),
        _capped(True),
        Part("kernels", steps.kernel_runs, steps.kernels_in_words, 30),
        Part("offload", offload.runs, offload.in_words, 30),
        _fidelity("fp32", True),
        _fidelity("bf16-mixed", True),
        _capped(False),
        Part("residues", steps.byte_runs, steps.bytes_in_words, 25),
        Part("against", against.runs, against.in_words, 60),
    )
}


def run_part(part: Part, setting: Setting, folder: Path, seconds: float) -> bool:
    """Run what is missing of a part, as far as the time goes; a line for each run.

    A run that would take longer than the longest so far has taken is not begun.

    Returns:
        Whether it is complete, failed runs included.
    """
    end = time.monotonic() + seconds
    # Measurements look for garbage first, which takes longest where there is none: among what was loaded.
    gc.collect()
    gc.freeze()
    results = Results.of(folder, part.name, part.settings(setting))
    if part.cuda_only and setting.device != "cuda":
        results.skipped, results.complete = part.cuda_only, True
        results.write()
        click.echo(f"{part.name}: skipped: {part.cuda_only}")
        return True
    longest = 0.0
    for name, run in part.runs(setting).items():
        if results.has(name):
            continue
        begun = time.monotonic()
        if begun + longest > end:
            click.echo(f"{part.name}: {name} and what comes after it would not fit the time that is left")
            return False
        results.rows[name] = row = _tried(run)
        results.write()
        said = f"failed: {row['error']}" if "error" in row else part.in_words(row)
        click.echo(f"{part.name}: {name}: {said}")
        longest = max(longest, time.monotonic() - begun)
    results.complete = True
    results.write()
    return True


def _tried(run: Callable[[], Row]) -> Row:
    """A run's row, or what went wrong: the others are still worth having."""
    begun = time.monotonic()
    try:
        row = run()
    except Exception as error:  # whatever a driver or a library says
        row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return row | {"took_seconds": time.monotonic() - begun}
