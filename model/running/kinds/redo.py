"""A run of a block that somebody else wrote, of which modules of some levels are recomputed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evoplan.model.running.kinds.whole import Whole
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import Submodule


class Redo(Whole):
    """Keeps what the block's children are given, and what is made between them.

    Args:
        depth: how many levels of modules are recomputed, each within the one above.
    """

    pays_in_inference = False

    def __init__(self, depth: int) -> None:
        self.name = "redo" if depth == 1 else f"redo{depth}"
        self.recomputed_depth = depth

    def offered(self, submodule: Submodule, shape: Sequence[int]) -> Iterator[Strategy]:
        """None: submodules are the level at which a schedule recomputes."""
        return iter(())
