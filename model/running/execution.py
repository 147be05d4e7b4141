"""Running one submodule under a strategy: forward, and the vector-Jacobian product of backward.

The maths is the submodule's three stages; a strategy's kind decides in how many pieces they run, and what is
kept for backward.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from evoplan.model.running.internals import without_graph
from evoplan.model.running.kernels import using
from evoplan.model.running.parameters import Parameters
from evoplan.model.running.remake import Keeping
from evoplan.model.running.strategy import Record, Strategy
from evoplan.model.running.submodule import Submodule, Tensors


def run_discarded(
    submodule: Submodule, strategy: Strategy, tensors: Tensors, in_place: bool = False
) -> Tensor:
    """The new target, keeping nothing for backward. Call without autograd.

    Args:
        in_place: pieces may write into the old target: nobody else has it, and nobody reads it again. A whole
            run makes its update as large as the target anyway and adds it up there.
    """
    strategy = strategy.way.possible(submodule, strategy)
    tensors = {name: without_graph(tensor) for name, tensor in tensors.items()}
    with using(strategy.kernel):
        return strategy.way.discarded(submodule, strategy, tensors, in_place)


def record_unread(
    submodule: Submodule,
    strategy: Strategy,
    tensors: Tensors,
    wanted: Collection[str] | None = None,
    owner: str = "a submodule",
    parameters: Parameters | None = None,
) -> Record:
    """The record that `record` makes, where nobody reads the new target; in pieces, the input alone."""
    strategy = strategy.way.possible(submodule, strategy)
    kept, _ = strategy.way.recorded(submodule, strategy, tensors, wanted, owner, parameters, unread=True)
    return kept


def record(
    submodule: Submodule,
    strategy: Strategy,
    tensors: Tensors,
    wanted: Collection[str] | None = None,
    owner: str = "a submodule",
    parameters: Parameters | None = None,
    movable: bool = False,
) -> tuple[Record, Tensor]:
    """Run forward for a later backward: the record to call `vjp` on, and the new target.

    Args:
        movable: the record is to know its storages, which may be elsewhere until then.
    """
    strategy = strategy.way.possible(submodule, strategy)
    kept, made = strategy.way.recorded(submodule, strategy, tensors, wanted, owner, parameters, movable)
    assert made is not None  # somebody reads it
    return kept, made


def write(
    submodule: Submodule, strategy: Strategy, tensors: Tensors, owner: str = "a submodule"
) -> tuple[Keeping | None, Tensor]:
    """Run forward within autograd's own graph, as a model without a plan has it; not in pieces.

    Returns:
        What the graph keeps of the run, if it is held where it can be let go of; and the new target.
    """
    return strategy.way.written(submodule, strategy, tensors, owner)
