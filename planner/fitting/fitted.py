"""`evoplan.fit`: a model that anybody wrote, trained within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evoplan.cost_model.simulation import garbage_left
from evoplan.model.foreign.knobs import Knobs
from evoplan.planner.arguments import check_choices, check_kinds
from evoplan.planner.files import check_writable, write_json, write_text
from evoplan.planner.fitting.certifying import certificate_of_fit, certified
from evoplan.planner.fitting.given import check_call
from evoplan.planner.fitting.making import bytes_of, made_before, planned
from evoplan.planner.fitting.pages import content_of_fit
from evoplan.planner.fitting.patched import OnChange, Patched
from evoplan.planner.fitting.plan import FitPlan, load_fit_plan
from evoplan.planner.fitting.problem import Fitting, Timing, autocast_in_force, fitting_of
from evoplan.planner.fitting.simulating import Loss, mean_of_squares
from evoplan.planner.fitting.solving import sampled_frontier
from evoplan.planner.fitting.sweeping import sweep_of_fit, swept
from evoplan.planner.fitting.verifying import FitVerification, verify_fit
from evoplan.planner.pages.verified import verified_of
from evoplan.planner.pages.writing import write_pages
from evoplan.planner.problems.prediction import Prediction
from evoplan.planner.problems.problem import Optimizer


class Fitted:
    """A model under a plan: the model itself, its blocks' forwards in other hands until `remove`.

    Attributes:
        model: the model.
        plan: what it runs under; `plan.predicted`, `plan.baselines`, `plan.save(path)`.
    """

    def __init__(self, fitting: Fitting, plan: FitPlan, on_change: OnChange) -> None:
        self.model, self.plan, self._fitting = fitting.model, plan, fitting
        self._patched = Patched(fitting.model, fitting.captured, plan.schedule, on_change)
        self._patched.install()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    def verify(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> FitVerification:
        """Run a training step with and without the plan on real inputs, and compare: peak, loss, gradients.

        The model's gradients and buffers are left as they were.

        Args:
            args, kwargs: what the model is called with; as many tensors, and of the shapes, that it was
                planned for.

        Returns:
            Peaks in bytes, errors, and `ok`: whether all is within tolerance and budget.

        Raises:
            ChangedCallError: a block is called otherwise than it was planned for.
        """
        return verify_fit(self._fitting, self.plan, self._patched, args, kwargs or {})

    def report(self) -> str:
        """The plan in words."""
        return self.plan.report()

    def certify(self) -> FitPlan:
        """Prove what can be proven of the plan: `plan.solver.gap`, `plan.solver.certificates`.

        Returns:
            The plan with its certificates, which is the model's from now on; its schedule is the same.
        """
        self.plan = certified(self._fitting, self.plan)
        return self.plan

    def certificate(self, path: str | Path) -> None:
        """Write a certificate of the plan that anybody can check: docs/certificates.md.

        Args:
            path: of the file, JSON.
        """
        check_writable(path)
        write_json(path, certificate_of_fit(self._fitting, self.plan))

    def frontier(self, points: int = 12) -> list[Prediction]:
        """What can be had: peak and time of the fastest plans, from the least memory on.

        Args:
            points: budgets that are tried, at most; each is a simulation of the whole step.

        Returns:
            Bytes and seconds of a step, least memory first.
        """
        return [fit.predicted for fit in sampled_frontier(self._fitting, points)]

    def sweep(
        self,
        points: int = 60,
        html: str | Path | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> dict[str, Any]:
        """The same as `evoplan sweep` writes it: `points`, and `baselines` beside them; bytes and seconds.

        Args:
            points: budgets that are tried, at most.
            html: where to write a page about it, if anywhere.
            progress: told of each point that is through; each is a simulation of the whole step.
        """
        check_writable(html)
        document, plans = swept(self._fitting, points, progress)
        if html is not None:
            write_text(html, sweep_of_fit(self._fitting, document, plans))
        return document

    def report_html(self, path: str | Path, verification: FitVerification | None = None) -> None:
        """Write one page about the plan: what is done with each block, memory over time, the frontier.

        Args:
            path: of the page, HTML.
            verification: what `verify` has returned, shown beside the prediction.
        """
        check_writable(path)
        verified = None if verification is None else verified_of(verification.to_json())
        write_pages(content_of_fit(self.plan, self._fitting, verified), html=path)

    def memory_viz(self, path: str | Path) -> None:
        """Write a predicted snapshot of the blocks' memory for PyTorch's memory viewer.

        Args:
            path: of the file, a pickle.
        """
        check_writable(path)
        write_pages(content_of_fit(self.plan, self._fitting, points=None), snapshot=path)

    def perfetto(self, path: str | Path) -> None:
        """Write a predicted trace of the blocks for Perfetto or chrome://tracing.

        Args:
            path: of the file, JSON.
        """
        check_writable(path)
        write_pages(content_of_fit(self.plan, self._fitting, points=None), trace=path)

    def replan(self, budget: str | int | None) -> None:
        """Run under another budget from now on, on the costs that are known.

        Args:
            budget: as `fit` takes it.

        Raises:
            NoPlanError: nothing fits; the model runs on as it did.
        """
        self.plan = planned(self._fitting, bytes_of(budget))
        self._patched.remove()
        self._patched = Patched(
            self.model, self._fitting.captured, self.plan.schedule, self._patched.on_change
        )
        self._patched.install()

    def remove(self) -> None:
        """The model as it was."""
        self._patched.remove()


def fit(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    budget: str | int | None = None,
    loss: Loss | None = None,
    plan: str | Path | FitPlan | None = None,
    *,
    optimizer: Optimizer = "adamw",
    device: str | None = None,
    autocast: torch.dtype | None = None,
    on_change: OnChange = "error",
    knobs: Knobs | None = None,
    times: Timing = "predicted",
) -> Fitted:
    """Train a model within a memory budget, whoever wrote it.

    Its blocks are found, and what each of them costs kept, recomputed, or with modules in it recomputed or
    run in slices; the fastest combination whose whole step stays within the budget is applied to the model
    itself, which keeps its class, its forward, its parameters' names, its hooks, and is trained as before.

    Args:
        model: any module whose blocks are called one after the other.
        args, kwargs: what it is called with; only shapes and dtypes count.
        budget: of the peak of a whole training step, such as "8GiB", or bytes: parameters, their gradients,
            the optimizer's states and inputs included. None: the fastest plan of all.
        loss: takes the model's output and returns a scalar; the mean of squares of all that it returns if not
            given. The peak holds for it.
        plan: one that was made before for this model, or its file; nothing is solved then.
        optimizer: whose states count: none, sgd (with momentum) or adamw.
        device: to plan for, by its name in the device table or its file; where the model lies if not given.
        autocast: dtype that torch.autocast casts to in forward; what is in force where `fit` is called if not
            given.
        on_change: what to do where a block is called otherwise than planned, with other shapes, say: raise an
            error, or run the rest of that forward unplanned.
        knobs: of the blocks' own, and values to choose from, such as {"chunk_size": [None, 4, 16]}: the name
            of an argument of theirs or of an attribute of modules in them; or, for anything else, a pair of a
            function that sets it, `(block, value) -> None`, and values. What changes results is left out.
        times: of blocks under each strategy: predicted, of a roofline with the rates that `evoplan profile`
            has fitted to this machine, if it has; of the roofline as it is listed; or measured on the model
            itself where it lies, which takes some thirty runs of a block in each way that is offered, and
            their memory.

    Raises:
        NoPlanError: nothing fits; says the least that does.
        CaptureError: the model cannot be planned; says why.
        PlanFileError: the file is none, or was altered.
    """
    check_call(model, args, kwargs, loss, optimizer, device, autocast, knobs)
    check_choices(on_change=(on_change, OnChange), times=(times, Timing))
    check_kinds(plan=(plan, str | Path | FitPlan | None, "what `fit(...).plan` is, or its file"))
    size = bytes_of(budget)
    given_loss = loss or mean_of_squares
    autocast = autocast or autocast_in_force(model)
    before = None if plan is None else plan if isinstance(plan, FitPlan) else load_fit_plan(plan)
    about = given_loss, optimizer, autocast, device, knobs, times, before.strategies if before else ()
    # Many objects are made here, among many that a model's packages have: to look for garbage takes long.
    with garbage_left() if times == "predicted" else nullcontext():
        fitting = fitting_of(model, tuple(args), dict(kwargs or {}), *about)
        made = planned(fitting, size) if before is None else made_before(fitting, before, size)
    return Fitted(fitting, made, on_change)
