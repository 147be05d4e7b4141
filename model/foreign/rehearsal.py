"""The calls of a model's blocks on real inputs, with nothing run inside of the blocks.

Code before the blocks may look at values, or do otherwise where there are none: leave out a mask that hides
nothing, say. So what blocks are given is noted once more on the tensors that the model is called with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.as_they_were import left_as_it_is
from evoplan.model.foreign.calls import Call, Made
from evoplan.model.foreign.capture import Captured, CaptureError, captured_again
from evoplan.model.foreign.leaves import Layout, Value
from evoplan.model.foreign.visits import Visit, keys_of
from evoplan.model.running.internals import other_forwards

logger = logging.getLogger(__name__)


class _Enough(Exception):
    """The last block has been called."""


def rehearsed(model: nn.Module, captured: Captured, run: Callable[[], Any]) -> Captured:
    """The chain as real inputs have it; the same where nothing differs, or where it cannot be told.

    Args:
        model: with data.
        run: its forward, which stops at the last block.
    """
    visits = _visits(model, captured, run)
    # Where it has called fewer blocks, what differs will be said when it runs.
    return captured if visits is None else captured_again(captured, visits)


def given_to_blocks(model: nn.Module, captured: Captured, run: Callable[[], Any]) -> list[list[Any]]:
    """The leaves of what each call is given, those that another block makes without values.

    Args:
        model, run: as `rehearsed` has them.

    Raises:
        CaptureError: other blocks are called than when the chain was captured.
    """
    visits = _visits(model, captured, run)
    if visits is None:
        raise CaptureError(
            "other blocks are called on these inputs than without data, or the model does not run where its "
            "blocks make noughts; fit without times"
        )
    return [visit.arguments for visit in visits]


def _visits(model: nn.Module, captured: Captured, run: Callable[[], Any]) -> list[Visit] | None:
    rehearsal = _Rehearsal(model, captured)
    with left_as_it_is(model), rehearsal.installed():
        try:
            run()
        except _Enough:
            return rehearsal.visits
        except (CaptureError, MemoryError):
            raise
        except Exception as error:
            if not rehearsal.visits:  # the model's own code, on the user's own inputs
                said = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
                about = f"{type(model).__name__} fails on what it is called with ({said})"
                raise CaptureError(about) from error
            logger.debug("no rehearsal: %s", error)  # blocks have made noughts, which may not do
    return None


class _Rehearsal:
    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model, self.calls = model, captured.calls
        self.visits: list[Visit] = []

    def installed(self) -> AbstractContextManager[None]:
        """Blocks return what they would make, without values."""
        blocks = {path: self.model.get_submodule(path) for path in (call.path for call in self.calls)}
        return other_forwards({block: self._noting(path, block) for path, block in blocks.items()})

    def _noting(self, path: str, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def noting(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            call = self.calls[len(self.visits)]
            if call.path != path:
                raise _Enough
            leaves, structure = pytree.tree_flatten((args, kwargs))
            visit = Visit(path, block, leaves, structure)
            made = [_imagined(result, leaves) for result in call.made]
            visit.results, visit.returned = _whole(call, made, leaves), call.returned
            visit.out_keys = keys_of(visit.results)
            self.visits.append(visit)
            if len(self.visits) == len(self.calls):
                raise _Enough
            return pytree.tree_unflatten(visit.results, call.returned)

        return noting


def _whole(call: Call, made: list[Tensor], leaves: list[Any]) -> list[Any]:
    """All leaves of what a call returns."""
    rest = [result.value if isinstance(result, Value) else None for result in call.results]
    return pytree.tree_leaves(call.result_of(made, rest, leaves))


def _imagined(made: Made, leaves: list[Any]) -> Tensor:
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
    wanted = torch.empty((), dtype=made.layout.dtype, device=device)
    made_so: Tensor = _Zeros.apply(wanted.requires_grad_(made.differentiable), made.layout)  # type: ignore[no-untyped-call]
    return made_so


class _Zeros(torch.autograd.Function):
    """Laid out as the block does it, and no leaf: the model may go on to write into them."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, layout: Layout) -> Tensor:
        reach = layout.nbytes // layout.dtype.itemsize
        return wanted.new_zeros(reach).as_strided(layout.shape, layout.stride).data
