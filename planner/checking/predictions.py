"""Whether what a plan file predicts is what a replay of its schedule finds: a file may say anything."""

from __future__ import annotations

from math import isclose

from evoplan.model.running.kinds import WHOLE
from evoplan.planner.plans.plan import Plan
from evoplan.planner.problems.costing import Costed, cost_problem, peaks_of_ranks, torch_version
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import MEAN_SQUARE
from evoplan.planner.schedules.schedule import opaque_kernels, strategies_used
from evoplan.planner.sizes import exact_size, format_seconds
from evoplan.planner.solvers import BASELINES

# Scratch of CPU kernels differs from machine to machine, as the peak that `verify` measures may.
CPU_SHARE, CPU_FLOOR = 0.02, 4096


def check_predicted(plan: Plan) -> None:
    """Refuse figures that are not what the plan's schedule takes, as far as that can be found here.

    It cannot for kernels that are measured instead of traced, nor where another torch traced; and seconds are
    known of the roofline of a named device alone: this machine's GPU, and measured times, may be others now.

    Raises:
        ValueError: names the figure, says what it should be, and what to do.
    """
    if opaque_kernels(plan.schedule) or plan.costs.get("torch", torch_version()) != torch_version():
        return
    # Both what the plan runs and what people do by hand.
    used = {step: {WHOLE, *there} for step, there in strategies_used(plan.schedule).items()}
    costed = cost_problem(plan.problem, only=used)
    for part, size in costed.static.items():
        if not (part == "workspace" and plan.problem.device == "cuda"):
            _check_bytes(f"static.{part}", plan.static.get(part, 0), size)
    _check("predicted", plan, costed, plan.predicted, costed.predict(plan.schedule), largest=True)
    for name, make in BASELINES.items():
        if name in plan.baselines:
            _check(
                f"baselines.{name}", plan, costed, plan.baselines[name], costed.predict(make(costed.table))
            )


def _check(
    name: str, plan: Plan, costed: Costed, says: Prediction, found: Prediction, largest: bool = False
) -> None:
    """Hold one prediction against the replay's.

    Args:
        largest: the prediction's bytes are those of the rank that needs the most.
    """
    static = sum(costed.static.values())
    said: tuple[int, ...] = (says.peak_bytes,)
    peaks: tuple[int, ...] = (found.peak_bytes,)
    if largest:
        said, peaks = plan.rank_peak_bytes or said, peaks_of_ranks(costed, plan.schedule)
    for given, peak in zip(said, peaks, strict=True):
        activations = given - says.static_bytes  # a GPU's workspace aside
        missing = peak - static - activations
        allowed = max(CPU_SHARE * peak, CPU_FLOOR) if costed.device.kind == "cpu" else 0
        # A loss of the user's own, which is not in the file, can only add to the peak.
        beyond = missing if plan.problem.loss != MEAN_SQUARE else abs(missing)
        if beyond > allowed:
            _refuse(f"{name}.peak_bytes", exact_size(given), exact_size(given + missing))
    _check_bytes(f"{name}.host_bytes", says.host_bytes, found.host_bytes)
    known = plan.costs["time"] == "roofline" and plan.problem.device != "cuda"
    if known and not isclose(says.step_seconds, found.step_seconds, rel_tol=1e-9):
        _refuse(f"{name}.step_seconds", format_seconds(says.step_seconds), format_seconds(found.step_seconds))


def _check_bytes(name: str, given: int, found: int) -> None:
    if given != found:
        _refuse(name, exact_size(given), exact_size(found))


def _refuse(name: str, given: str, found: str) -> None:
    raise ValueError(f"{name} is {given}, and what its schedule takes is {found}; make it again")
