"""What stands in the way of running a block again, or of its results being a step's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evoplan.model.foreign.visits import Visit
from evoplan.model.foreign.watching import Operator
from evoplan.model.running.internals import has_hooks

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice)

_KEPT_BACK = (
    ", or a hook in it, keeps a tensor that a gradient is wanted of afterwards, where it would be cut off "
    "from the rest of the graph: have it return that (of transformers' models: output_attentions=False, "
    "output_router_logits=False)"
)


def obstacles(visits: Sequence[Visit], operators: Sequence[Operator]) -> dict[Visit, str]:
    """Of blocks that something stands in the way of, what: to be read after the block's name."""
    kept = _kept_back(visits, operators)
    found = {visit: _obstacle(visit) or (_KEPT_BACK if visit in kept else None) for visit in visits}
    return {visit: said for visit, said in found.items() if said is not None}


def _obstacle(visit: Visit) -> str | None:
    if visit.hooked or (visit.children and all(child.hooked for child in visit.children)):
        return (
            " is called under torch.utils.checkpoint, or other saved-tensor hooks; turn the model's own "
            "checkpointing off: a plan takes its place"
        )
    if visit.differentiated:
        return (
            " is differentiated before the model's forward and the loss are over, as for forces "
            "(torch.autograd.grad), and once more after that; leave the model unplanned: "
            "torch.utils.checkpoint(..., use_reentrant=False) around its blocks allows for it"
        )
    if visit.replaces:
        return (
            f" changes {', '.join(visit.replaces[:3])}, which it reads, and which is no buffer: run again it "
            "would change that once more; register it as a buffer"
        )
    said = (*map(of_argument, visit.arguments), *map(_of_result, visit.results))
    return next((one for one in said if one is not None), None)


def of_argument(leaf: Any) -> str | None:
    """The same of a leaf of what a block is given."""
    if isinstance(leaf, (Tensor, *PLAIN)):
        return None
    return (
        f" is given a {type(leaf).__name__}, which it may change when it runs; call the model so that its "
        "blocks are given tensors and plain values (of transformers' models: use_cache=False)"
    )


def _of_result(leaf: Any) -> str | None:
    if isinstance(leaf, (Tensor, *PLAIN)):
        return None
    return f" returns a {type(leaf).__name__}; have it return tensors, in tuples, lists or dictionaries"


def is_simple(visit: Visit) -> bool:
    """Whether nothing stands in the way of running a module again, nor could; of a block that is too much."""
    return (
        visit.recorded
        and not (visit.writes or visit.changes or any(has_hooks(inner) for inner in visit.module.modules()))
        and _obstacle(visit) is None
    )


def _kept_back(visits: Sequence[Visit], operators: Sequence[Operator]) -> set[Visit]:
    """Blocks that have made a tensor, not returned it, and left it for others to differentiate."""
    found: set[Visit] = set()
    within = {at: visit for visit in visits for at in range(visit.start, visit.stop)}
    returned = {visit: {key.numbers[0] for key in visit.out_keys if key is not None} for visit in visits}
    makers: dict[int, Visit | None] = {}  # of each storage that there is now, as places are used again
    for at, operator in enumerate(operators):
        for storage in operator.wanted:
            maker = makers.get(storage)
            if maker is not None and maker is not within.get(at) and storage not in returned[maker]:
                found.add(maker)
        makers |= dict.fromkeys(operator.made, within.get(at))
    return found
