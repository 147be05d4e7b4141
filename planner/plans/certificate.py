"""The certificate of a plan: its cost table, its schedule, and a bound, for anybody to check.

`tools/check_certificate.py` needs nothing but the file; docs/certificates.md has the format and the proof.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from fractions import Fraction
from typing import Any

from evoplan.cost_model.costs import CostTable
from evoplan.cost_model.steps import StepCost
from evoplan.planner.plans.certify import check_training
from evoplan.planner.plans.plan import Plan
from evoplan.planner.problems.costing import Costed
from evoplan.planner.schedules.offload import waits
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Sequence
from evoplan.planner.schedules.text import schedule_to_json
from evoplan.planner.solvers.proof import best_proof
from evoplan.planner.solvers.relaxed import exact

CLASS = (
    "persistent schedules of the options in the table, checkpoints inside a block or over whole blocks, "
    "nested to any depth; memory as the dynamic program charges it"
)


def decimal(value: Fraction) -> str:
    """A fraction whose denominator has no factors but 2 and 5, as the decimal number that it is.

    Raises:
        ValueError: it is no decimal number.
    """
    digits = next((n for n in range(400) if 10**n % value.denominator == 0), None)
    if digits is None:
        raise ValueError(f"{value} is no decimal number")
    whole, part = divmod(int(value * 10**digits), 10**digits)
    return f"{whole}.{part:0{digits}d}" if digits else str(whole)


def table_document(table: CostTable) -> dict[str, Any]:
    """A cost table as certificates have it: options, steps and blocks that are equal are stored once."""
    options: dict[int, int] = {}
    steps: dict[Hashable, int] = {}
    blocks: dict[Hashable, int] = {}
    found: dict[str, list[Any]] = {"options": [], "steps": [], "blocks": [], "groups": []}

    def number(known: dict[Any, int], key: Hashable, kind: str, value: Any) -> int:
        if key not in known:
            known[key] = len(known)
            found[kind].append(value)
        return known[key]

    for group in table.groups:
        block = []
        for k in group:
            costs, reads, makes = table.options[k], table.step_reads[k], table.makes[k]
            of_step = number(options, id(costs), "options", {str(c.strategy): _option(c) for c in costs})
            step = {"options": of_step, "reads": list(reads), "makes": list(makes)}
            block.append(number(steps, (of_step, reads, makes), "steps", step))
        found["groups"].append(number(blocks, tuple(block), "blocks", block))
    return {
        "state_bytes": dict(table.state_bytes),
        "outputs": [version.tensor for version in table.liveness.outputs],
        "loss_bytes": table.loss_bytes,
        **found,
    }


def _option(cost: StepCost) -> dict[str, Any]:
    return {
        "forward_bytes": cost.forward_bytes,
        "preserved_bytes": cost.preserved_bytes,
        "first_backward_bytes": list(cost.backward(in_graph=True)),
        "backward_bytes": list(cost.backward(in_graph=False)),
        "discard_bytes": cost.discard_bytes,
        "forward_seconds": float(cost.forward_seconds),
        "backward_seconds": float(cost.backward_seconds),
        "discard_seconds": float(cost.discard_seconds),
        "keeps_made": list(cost.keeps_made),
        "ending": cost.ending
        and {"forward_bytes": cost.ending.bytes, "forward_seconds": float(cost.ending.seconds)},
    }


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with a digest of its content, by which one that was altered is told."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return {**document, "digest": hashlib.sha256(canonical.encode()).hexdigest()}


def certificate(
    table: CostTable, schedule: Sequence, budget_bytes: int, about: dict[str, Any], room: str = ""
) -> dict[str, Any]:
    """What can be proven of a schedule, as a document.

    Args:
        budget_bytes: of the chain: what the whole budget leaves for it.
        about: what the certificate is for, in words and figures that nothing is proven of.
        room: what the class is limited to besides, in words.
    """
    played = replay(schedule, table)
    found = best_proof(table, budget_bytes)
    return sealed(
        {
            "format": "evoplan-certificate",
            "schema_version": 2,
            "about": about,
            "class": CLASS + room,
            "budget_bytes": budget_bytes,
            "plan": {
                "peak_bytes": played.peak_bytes,
                "seconds": decimal(sum((exact(moment.seconds) for moment in played.moments), Fraction(0))),
                "schedule": schedule_to_json(schedule),
            },
            "bound": {
                "seconds": None if found.seconds is None else decimal(found.seconds),
                "unit_bytes": found.unit_bytes,
                "price": decimal(found.price),
            },
            "table": table_document(table),
        }
    )


def certificate_of(costed: Costed, plan: Plan) -> dict[str, Any]:
    """The certificate of a plan of one of our own models.

    Raises:
        ValueError: it is for inference, or its costs are not those that it was made with; says what to do.
    """
    check_training(plan)
    if waits(plan.schedule) or plan.problem.host_bytes:
        raise ValueError(
            "the class that is certified keeps all on the device; certify a plan without host memory, or see "
            "`evoplan plan --certify`"
        )
    budget = costed.chain_budget()
    predicted = costed.predict(plan.schedule)
    if predicted.step_seconds != plan.predicted.step_seconds or costed.problem.ranks > 1:
        why = "it is for several ranks" if costed.problem.ranks > 1 else "its times are not known here"
        raise ValueError(f"{why}; certify a plan for one rank that was made on this machine")
    about = {
        "model": plan.problem.model,
        "budget_bytes": plan.problem.budget_bytes,
        "beside_the_chain_bytes": costed.fixed_bytes,
        "times": plan.costs["time"],
        "plan": plan.identity["plan"],
    }
    return certificate(
        costed.table, plan.schedule, costed.table.most_bytes if budget is None else budget, about
    )
