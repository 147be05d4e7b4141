"""The kinds of runs, one file each, in the order in which they are offered."""

from evoplan.model.running.kinds.chunk import Chunk
from evoplan.model.running.kinds.coshard import Coshard
from evoplan.model.running.kinds.lean import Lean
from evoplan.model.running.kinds.whole import Whole
from evoplan.model.running.strategy import Strategy, register

register(Whole(), Lean(), Chunk(), Coshard())

WHOLE, LEAN = Strategy(Whole.name), Strategy(Lean.name)
