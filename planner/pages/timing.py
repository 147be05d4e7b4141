"""An account along its time: layers of memory, when moments start, and what one is made of."""

from __future__ import annotations

from itertools import accumulate

from evoplan.planner.pages.account import Account

LAYERS = ("static", "gradients", "state", "preserved", "workspace")  # from the bottom
WORDS = {
    "static": "static", "gradients": "gradients of the state", "state": "state",
    "preserved": "kept for backward", "workspace": "workspace of the step",
}  # fmt: skip


def layers_of(account: Account) -> list[tuple[int, ...]]:
    """Of each moment, bytes of each layer; their sum is all that is live."""
    fixed = account.fixed_bytes
    return [(fixed, *(parts[name] for name in LAYERS[1:])) for parts in account.holdings.parts]


def starts_of(account: Account) -> list[float]:
    """When each moment starts, in seconds, and the end of the last."""
    return [0.0, *accumulate(moment.seconds for moment in account.moments)]


def groups_of(account: Account, at: int) -> list[tuple[str, str, int, int]]:
    """What is live at a moment: (layer, what, how many, bytes), the largest first."""
    found: dict[tuple[str, str], list[int]] = {}
    for one in account.holdings.live(at):
        key = one.kind, group_name(account, one.kind, one.name, one.step)
        found.setdefault(key, []).append(one.bytes)
    moment, work = account.moments[at], account.holdings.workspace[at]
    rows = [(kind, what, len(sizes), sum(sizes)) for (kind, what), sizes in found.items()]
    rows += [("static", name, 1, size) for name, size in account.static.items()]
    if work:
        rows.append(("workspace", f"{moment.phase} of {account.where(moment)}", 1, work))
    return sorted(rows, key=lambda row: -row[3])


def group_name(account: Account, kind: str, name: str | None, step: int) -> str:
    """Under which name something is counted with its like."""
    if kind == "preserved":
        return f"kept by {like(account.names[step])}"
    return f"gradient of {name}" if kind == "gradients" else str(name)


def like(step_name: str) -> str:
    """A step's name with its numbers left out: those of the same submodule are alike."""
    return ".".join(part for part in step_name.split(".") if not part.isdigit())
