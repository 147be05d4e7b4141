"""Which submodules make something that their own backward never reads."""

from __future__ import annotations

from evoplan.model.running.internals import members
from evoplan.model.running.layers import altered_layers
from evoplan.model.running.submodule import Submodule
from evoplan.model.running.unread import is_affine_at_the_end

_STAGES = {"forward", "piece", "finish", "update", "new_target"}


def leaves_results_unread(submodule: Submodule) -> bool:
    """Whether the backward of an update, and of the target with it, reads nothing of its last product.

    So as the class says it of its own stages, all layers being what they were made to be.
    """
    own = type(submodule)
    said = is_affine_at_the_end(own.piece) and is_affine_at_the_end(own.finish)
    as_here = own.update is Submodule.update and own.new_target is Submodule.new_target
    others = any(_STAGES & inner.__dict__.keys() for inner in members(submodule).modules)
    return said and as_here and not others and not any(altered_layers(submodule))
