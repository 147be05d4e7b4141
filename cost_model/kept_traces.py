"""Traced costs kept on disk: what one process has traced, the next one reads.

A trace follows from the sources of the model and of the cost model, torch, the step with its widths, the
tensors that it reads, and how it is run. All of that is the key.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evoplan.cost_model.kept import Store, key_of, surroundings
from evoplan.cost_model.steps import AsWritten, Forward, StepCost
from evoplan.cost_model.trace import Work
from evoplan.model.running.layers import altered_layers
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import Submodule

_BYTES = ("forward_bytes", "preserved_bytes", "backward_bytes", "discard_bytes")
_WORKS = ("discard_work", "forward_work", "backward_work")


class KeptTraces:
    """Costs of steps by what they depend on.

    Args:
        about: what all costs depend on that are asked for here.
    """

    def __init__(self, about: Sequence[Any]) -> None:
        self._store = Store()
        self._about = (*surroundings(), *about)

    def costs(
        self,
        submodule: Submodule,
        about: Sequence[Any],
        strategies: Sequence[Strategy],
        trace: Callable[[Sequence[Strategy]], list[StepCost]],
    ) -> list[StepCost]:
        """Costs of a step under some strategies: those that are kept, and those that `trace` finds.

        Args:
            about: what they depend on, besides the submodule.
        """
        if self._store.path is None or not _is_ours(submodule):
            return trace(strategies)
        key = key_of((self._about, submodule.signature(), submodule.shared_by, *about))
        known = _parsed(self._store.read(key))
        missing = [strategy for strategy in strategies if str(strategy) not in known]
        if missing:
            found = dict(zip(map(str, missing), trace(missing), strict=True))
            self._store.write(key, {strategy: cost_to_text(cost) for strategy, cost in found.items()})
            known |= found
        return [known[str(strategy)] for strategy in strategies]


def _parsed(texts: Mapping[str, str]) -> dict[str, StepCost]:
    try:
        return {strategy: cost_from_text(strategy, text) for strategy, text in texts.items()}
    except (ValueError, TypeError, KeyError):
        return {}


def _is_ours(submodule: Submodule) -> bool:
    # Of a layer or a submodule that somebody else wrote, the sources are not in the digest.
    return type(submodule).__module__.startswith("evoplan.") and not any(altered_layers(submodule))


def cost_to_text(cost: StepCost) -> str:
    """A cost without its strategy and times, as JSON."""
    works = [_plain(getattr(cost, name)) for name in _WORKS]
    unread = cost.unread and (cost.unread.bytes, _plain(cost.unread.work))
    held = [cost.keeps_made, cost.backward_held_bytes, cost.as_written, unread]
    return json.dumps([[getattr(cost, name) for name in _BYTES], works, *held])


def _plain(work: Work) -> list[list[list[int]]]:
    return [[[*key, n] for key, n in counted.items()] for counted in (work.kernels, work.collectives)]


def _work(plain: list[list[list[int]]]) -> Work:
    return Work(*(Counter({(a, b): n for a, b, n in counted}) for counted in plain))


def cost_from_text(strategy: str, text: str) -> StepCost:
    """Its inverse.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    sizes, works, keeps_made, held_bytes, as_written, unread = json.loads(text)
    discard, forward, backward = map(_work, works)
    if unread is not None:
        unread_bytes, work = unread
        unread = Forward(unread_bytes, _work(work))
    if as_written is not None:
        backward_bytes, backward_held_bytes, keeps_given = as_written
        as_written = AsWritten(backward_bytes, backward_held_bytes, tuple(keeps_given))
    return StepCost(
        Strategy.parse(strategy),
        **dict(zip(_BYTES, sizes, strict=True)),
        discard_work=discard,
        forward_work=forward,
        backward_work=backward,
        keeps_made=tuple(keeps_made),
        backward_held_bytes=held_bytes,
        as_written=as_written,
        unread=unread,
    )
