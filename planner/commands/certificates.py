"""`evoplan certify`: a file that proves how far from optimal a plan may be, for anybody to check."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import click

from evoplan.planner.commands.flags import cache_option
from evoplan.planner.commands.terminal import console_for_output, progress
from evoplan.planner.files import check_writable, write_json


@click.command()
@click.argument("plan_file", type=click.Path())
@click.option("--out", type=click.Path(), required=True, help="Write the certificate here.")
@click.option(
    "--from", "source", metavar="FILE.py:FUNCTION", help="Of a plan of `plan --from`: what builds its model."
)
@cache_option
def certify(plan_file: str, out: str, source: str | None, cache: str | None) -> None:
    """Write a certificate of a plan: its costs, its schedule, and a bound on every other one.

    `python tools/check_certificate.py CERTIFICATE` checks it with Python's standard library alone:
    docs/certificates.md.
    """
    check_writable(out, reads=(plan_file, cache, source.rpartition(":")[0] if source else None))
    from evoplan.planner.fitting.plan import is_fit_plan

    if is_fit_plan(plan_file):
        document = _of_fit(plan_file, source)
    elif source is not None:
        raise ValueError(f"{plan_file} is no plan of `evoplan plan --from`; leave --from out")
    else:
        document = _of_own(plan_file, cache)
    write_json(out, document)
    console = console_for_output()
    console.print(_in_words(document), highlight=False, soft_wrap=True)
    console.print(f"certificate written to {out}", highlight=False, soft_wrap=True)


def _of_own(plan_file: str, cache: str | None) -> dict[str, Any]:
    from evoplan.planner.checking.consistency import load_consistent
    from evoplan.planner.plans.certificate import certificate_of
    from evoplan.planner.plans.certify import check_training
    from evoplan.planner.plans.recosting import cost_of_plan

    plan = load_consistent(plan_file)
    check_training(plan)
    with progress("tracing") as update:
        costed, lost = cost_of_plan(plan, cache, progress=lambda name: update(f"tracing {name}"))
        if lost:
            raise ValueError(f"{plan_file}: {lost}; certify it where it was made")
        update("bounding")
        return certificate_of(costed, plan)


def _of_fit(plan_file: str, source: str | None) -> dict[str, Any]:
    from evoplan.planner.commands.foreign import built_by, running
    from evoplan.planner.fitting.certifying import certificate_of_fit
    from evoplan.planner.fitting.making import fitting_for
    from evoplan.planner.fitting.plan import load_fit_plan

    plan = load_fit_plan(plan_file)
    if source is None:
        raise ValueError(
            f"{plan_file}: a plan of a {plan.model} has no costs of its blocks; "
            "add --from FILE.py:FUNCTION that builds the model"
        )
    with progress("making the model") as update, running(source):
        built = built_by(source)
        update("tracing its blocks")
        fitting, plan = fitting_for(plan, *built)
        update("bounding")
        return certificate_of_fit(fitting, plan)


def _in_words(document: dict[str, Any]) -> str:
    took, bound = Fraction(document["plan"]["seconds"]), document["bound"]["seconds"]
    if bound is None:
        return f"certificate: none of the {document['class']} fits the budget"
    return (
        f"certificate: {float(took):.6g} s, at most {float(took / Fraction(bound) - 1):.3%} slower than any "
        f"of the {document['class']}"
    )
