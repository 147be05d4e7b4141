"""One peer after another: put on, checked, measured, and timed beside the plan for its measured peak."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from evoplan.experiments.benchmark import Bench
from evoplan.experiments.interleaved import interleaved
from evoplan.experiments.peers.plans import plan_within
from evoplan.experiments.peers.registry import Peer, Setting, UnavailableError
from evoplan.experiments.peers.results import Document, Ours, Row, Times
from evoplan.planner.checking.profiling import profile_problem
from evoplan.planner.checking.trial import beyond_rounding, errors
from evoplan.planner.checking.verify import TOLERANCES
from evoplan.planner.plans.planning import NoPlanError
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import Times as Kind
from evoplan.planner.problems.timing import cost_with_times

PLAIN, PEER, PLAN = "plain", "peer", "plan"
HINT = "install it with: pip install -e '.[peers]'"
LONGEST_REASON = 300


class Comparison:
    """One model on one set of inputs, which everything runs on.

    Args:
        times: where the planner's come from; `measured` times every step first.
        compiled: whether submodules through torch.compile are among what is timed.
        rounds: timed runs of each peer and of the plan beside it; 0: peaks and gradients alone.
    """

    def __init__(
        self,
        problem: Problem,
        cache: str | None,
        rounds: int,
        say: Callable[[str], None],
        times: Kind = "measured",
        compiled: bool = False,
    ) -> None:
        if times == "measured":
            profile_problem(problem, cache, 5, compiled=compiled, progress=say)
        self.problem, self.rounds = problem, rounds
        self.bench = Bench(cost_with_times(problem, times, cache), problem.device)
        self.bench.add_module(PLAIN, self.bench.stack)
        self.static_bytes = self.bench.static_bytes(self.bench.trials[PLAIN])
        plain = self.bench.peaks[PLAIN] - self.static_bytes
        self.setting = Setting(
            self.bench.stack,
            self.bench.costed,
            plain,
            self.static_bytes,
            self.peak_of,
            dict(self.bench.inputs),
        )

    def peak_of(self, module: nn.Module) -> int:
        """Measured peak of a module, above static."""
        self.bench.add_module("trying", module)
        del self.bench.trials["trying"]
        return self.bench.peaks["trying"] - self.static_bytes

    def row(self, peer: Peer, share: float | None) -> Row:
        """Everything about a peer at an asking; what it cannot do is its row's reason."""
        plain = self.setting.plain_peak_bytes
        asked = peer.budget(share, plain)
        row = Row(
            name=peer.name, about=peer.about, source=peer.source, kind=peer.kind, unit=peer.unit,
            share=share, asked=asked, asked_bytes=None if share is None else int(share * plain),
        )  # fmt: skip
        start = time.perf_counter()
        try:
            self.bench.add_module(PEER, peer.apply(self.setting, asked))
            row.setup_seconds = time.perf_counter() - start
            row.peak_bytes = self.bench.peaks[PEER] - self.static_bytes
            self._check(row)
            self._time(row)
        except Exception as error:  # whatever somebody else's program says when it cannot
            row.status, row.reason = "failed", _reason(error)
        for name in (PEER, PLAN):
            self.bench.trials.pop(name, None)
        gc.collect()
        return row

    def _check(self, row: Row) -> None:
        """Loss and every gradient against the plain model's."""
        plain, peer = self.bench.trials[PLAIN], self.bench.trials[PEER]
        row.loss_error, row.gradient_error = errors(plain, peer)
        tolerance = TOLERANCES[self.problem.precision]
        if not row.loss_error <= tolerance:
            row.status, row.reason = "wrong", f"the loss is off by {row.loss_error:.1g}"
            return
        off = row.gradient_error is not None and not row.gradient_error <= tolerance
        if off and (self.problem.mixed is None or beyond_rounding(plain, peer, self.problem) > tolerance):
            row.status, row.reason = "wrong", f"a gradient is off by {row.gradient_error:.1g}"

    def _time(self, row: Row) -> None:
        """The peer, and in turn with it the plan for what it takes."""
        assert row.peak_bytes is not None
        if row.kind != "ours":
            row.ours = Ours(budget_bytes=row.peak_bytes)
            try:
                plan = plan_within(self.setting, row.peak_bytes)
                self.bench.add(PLAN, plan)
                row.ours.peak_bytes = self.bench.peaks[PLAN] - self.static_bytes
                row.ours.predicted_peak_bytes = plan.predicted.peak_bytes - self.static_bytes
            except NoPlanError as error:
                row.ours.reason = str(error)
        if not self.rounds:
            return
        trials = self.bench.trials
        runs: dict[str, Any] = {name: trials[name].run for name in (PEER, PLAN) if name in trials}
        times = interleaved(runs, self.rounds, self.problem.device)
        row.seconds = Times.of(times[PEER])
        if row.ours is not None and PLAN in times:
            ratios = np.divide(times[PLAN], times[PEER])
            row.ours.seconds = Times.of(times[PLAN])
            row.ours.ratio = row.ours.seconds.median / row.seconds.median
            low, high = (float(np.percentile(ratios, q)) for q in (25, 75))
            row.ours.ratio_quartiles = (low, high)


def _reason(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{lines[0] if lines else ''}"[:LONGEST_REASON]
    if isinstance(error, ImportError):
        return f"{said or 'it cannot be imported'}; {HINT}"
    return said if isinstance(error, UnavailableError) else f"{type(error).__name__}: {said}"


def compare(
    document: Document, comparison: Comparison, peers: list[Peer], keep: Callable[[Row], None]
) -> None:
    """Rows of all peers at all their askings, but for those that the document has; `keep` is told of each."""
    document.static_bytes = comparison.static_bytes
    document.plain_peak_bytes = comparison.setting.plain_peak_bytes
    for peer in peers:
        for share in peer.askings():
            if document.row(peer.name, share) is None:
                row = comparison.row(peer, share)
                document.put(row)
                keep(row)
