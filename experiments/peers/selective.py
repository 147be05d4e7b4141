"""torch's selective checkpointing: by a list of operators, and by a greedy choice under a budget in bytes."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from evoplan.experiments.peers.by_hand import ByHand, Part, again
from evoplan.experiments.peers.registry import SHARES, Peer, Setting, register
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.internals import storage_key

_ATEN = torch.ops.aten
BATCHED = [_ATEN.bmm.default, _ATEN.baddbmm.default]
PRODUCTS = [_ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default, _ATEN.baddbmm.default]
SELECTIVE = "torch.utils.checkpoint.create_selective_checkpoint_contexts"
REPEATS = 3  # of each operator's time the least counts


def _products(kept: list[Any], setting: Setting, budget: float | None) -> nn.Module:
    keep = partial(create_selective_checkpoint_contexts, kept)
    return ByHand(setting.stack, around_block=partial(again, context_fn=keep))


@dataclass(frozen=True)
class Result:
    """What an operator of a block's forward makes.

    Attributes:
        call: its number among the block's operators.
        bytes: of a new tensor; 0 for a view.
        seconds: to make it again.
    """

    call: int
    bytes: int
    seconds: float


class _Timing:
    """A policy that keeps nothing and notes every operator of one forward."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self._last = time.perf_counter()

    def __call__(self, context: Any, function: Any, *args: Any, **named: Any) -> CheckpointPolicy:
        seconds = time.perf_counter() - self._last
        read = {storage_key(x) for x in tree_leaves((args, named)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(context.op_output) if isinstance(x, Tensor)]
        new = {storage_key(x): x.untyped_storage().nbytes() for x in made if storage_key(x) not in read}
        self.results.append(Result(len(self.results), sum(new.values()), seconds))
        self._last = time.perf_counter()
        return CheckpointPolicy.PREFER_RECOMPUTE


class _Keeping:
    """A policy that keeps the results of some calls."""

    def __init__(self, calls: Collection[int]) -> None:
        self._calls, self._call = calls, -1

    def __call__(self, context: Any, function: Any, *args: Any, **named: Any) -> CheckpointPolicy:
        self._call += 1
        kept = self._call in self._calls
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def results_of_block(setting: Setting) -> list[Result]:
    """Every operator of a block's forward; blocks are alike, so that the first one stands for all."""
    runs: list[list[Result]] = []

    def timed(part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        timing = _Timing()
        done = again(part, *tensors, context_fn=lambda: create_selective_checkpoint_contexts(timing))
        if len(runs) < REPEATS:
            runs.append(timing.results)
        return done

    while len(runs) < REPEATS:
        mean_square(*ByHand(setting.stack, around_block=timed)(**setting.inputs))
    return [
        Result(first.call, first.bytes, min(run[first.call].seconds for run in runs)) for first in runs[0]
    ]


def greedy(results: list[Result], blocks: int, room_bytes: int) -> list[set[int]]:
    """For each block, the calls whose results are kept: most seconds saved per byte first, as they fit.

    Source: after torchtitan's pass that keeps or recomputes under a budget (pull request 4636).
    """
    worth = [result for result in results if result.bytes and result.seconds > 0]
    worth.sort(key=lambda result: result.seconds / result.bytes, reverse=True)
    kept: list[set[int]] = [set() for _ in range(blocks)]
    for result in worth:
        for calls in kept:
            if result.bytes <= room_bytes:
                calls.add(result.call)
                room_bytes -= result.bytes
    return kept


def _keeping(setting: Setting, kept: list[set[int]]) -> nn.Module:
    numbers = iter(range(0))

    def around(part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        calls = kept[next(numbers)]
        return again(part, *tensors, context_fn=lambda: create_selective_checkpoint_contexts(_Keeping(calls)))

    def start(module: nn.Module, args: Any) -> None:
        nonlocal numbers
        numbers = iter(range(len(kept)))

    module = ByHand(setting.stack, around_block=around)
    module.register_forward_pre_hook(start)
    return module


def _greedy(setting: Setting, budget: float | None) -> nn.Module:
    assert budget is not None
    nothing: list[set[int]] = [set() for _ in range(setting.blocks)]
    # Whatever is kept comes on top of what recomputing every block takes.
    room = int(budget) - setting.peak_of(_keeping(setting, nothing))
    return _keeping(setting, greedy(results_of_block(setting), setting.blocks, max(0, room)))


register(
    Peer(
        "selective", "selective checkpointing per block: results of all matrix products are kept",
        SELECTIVE, "hand", partial(_products, PRODUCTS),
    ),
    Peer(
        "selective-batched", "the same of batched products alone, which attention is made of",
        SELECTIVE, "hand", partial(_products, BATCHED),
    ),
    Peer(
        "greedy", "per operator of a block keep or recompute, most seconds saved per byte first",
        "after torchtitan, pull request 4636 (greedy)", "automatic", _greedy, "bytes", SHARES,
    ),
)  # fmt: skip
