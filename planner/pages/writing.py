"""Pages and traces as files: each all of it or nothing, refused before the work where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

from evoplan.cost_model.times_cache import MissingTimesError
from evoplan.planner.files import write_atomically, write_text
from evoplan.planner.pages.account import Account
from evoplan.planner.pages.content import Content, content_of_plan
from evoplan.planner.pages.page import page
from evoplan.planner.pages.perfetto import perfetto
from evoplan.planner.pages.snapshot import memory_viz
from evoplan.planner.pages.verified import Verified
from evoplan.planner.plans.plan import Plan
from evoplan.planner.plans.recosting import cost_of_plan


def traced_content(plan: Plan, verified: Verified | None = None) -> Content:
    """What a page says of a plan, its costs traced here; without its memory where they cannot be."""
    try:
        costed, _ = cost_of_plan(plan)
    except MissingTimesError as error:
        return content_of_plan(plan, None, str(error), verified)
    return content_of_plan(plan, costed, verified=verified)


def write_pages(
    content: Content,
    html: str | Path | None = None,
    snapshot: str | Path | None = None,
    trace: str | Path | None = None,
) -> None:
    """Write what is asked for: a page, a snapshot for PyTorch's memory viewer, a trace for Perfetto.

    Everything is made before anything is written.

    Raises:
        ValueError: a snapshot or a trace is asked for where there are no costs.
        OSError: a file cannot be written; it is as it was.
    """
    text = None if html is None else page(content)
    pickled = None if snapshot is None else memory_viz(_account(content))
    events = None if trace is None else json.dumps(perfetto(_account(content)), separators=(",", ":"))
    if html is not None and text is not None:
        write_text(html, text)
    if snapshot is not None and pickled is not None:
        write_atomically(snapshot, pickled)
    if trace is not None and events is not None:
        write_text(trace, events + "\n")


def _account(content: Content) -> Account:
    if content.account is None:
        raise ValueError(f"no memory over time, and so no snapshot and no trace: {content.no_account}")
    return content.account
