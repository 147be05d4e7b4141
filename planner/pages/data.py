"""What the script of a page needs to say what a moment is made of, as plain types."""

from __future__ import annotations

from typing import Any

from evoplan.planner.pages.account import Account
from evoplan.planner.pages.draw_memory import FRAME, WIDTH
from evoplan.planner.pages.timing import LAYERS, WORDS, group_name, layers_of, starts_of


class _Table:
    """Texts that occur often, each once."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}

    def __call__(self, words: str) -> int:
        return self.at.setdefault(words, len(self.at))

    def texts(self) -> list[str]:
        return list(self.at)


def data_of(account: Account) -> dict[str, Any]:
    """Moments and what is held, in columns; bytes and seconds.

    `held` has a row of [layer, group, bytes, first moment, last moment] for each tensor; groups and phases
    are positions in lists of texts.
    """
    phases, groups, strategies = _Table(), _Table(), _Table()
    moments, passes = account.moments, account.holdings.passes
    held = [
        [LAYERS.index(one.kind), groups(group_name(account, one.kind, one.name, one.step)), one.bytes,
         one.first, one.last]
        for one in account.holdings.held
    ]  # fmt: skip
    return {
        "layers": list(LAYERS),
        "words": [WORDS[name] for name in LAYERS],
        "frame": {"x": FRAME.x, "width": FRAME.width, "of": WIDTH},
        "starts": [float(f"{start:.9g}") for start in starts_of(account)],
        "phase": [phases(moment.phase) for moment in moments],
        "where": [-1 if moment.step is None else moment.step for moment in moments],
        "strategy": [-1 if run is None else strategies(str(run.strategy)) for run in passes],
        "level": [0 if run is None else run.level for run in passes],
        "parts": [list(layers) for layers in layers_of(account)],
        "held": held,
        "static": account.static,
        "peak": account.peak_index,
        "names": list(account.names),
        "groups": groups.texts(),
        "phases": phases.texts(),
        "strategies": strategies.texts(),
    }
