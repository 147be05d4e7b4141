"""Every way to run a short chain, persistent or not: a shortest path over what is in memory.

For chains over one tensor. A state is (versions of the tensor, recorded steps and their strategies, backwards
left). Moves: run a step forward, discarding or recorded; drop anything at any time; backward of the last step
that is left. Memory is counted as the replay does.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from evoplan.cost_model.costs import CostTable

Memory = tuple[
    frozenset[int], frozenset[tuple[int, int]], int
]  # versions by maker, (step, option), backwards


def least_in_any_order(table: CostTable, budget: int) -> float:
    """Least seconds of a training step within a budget of `Replay.peak_bytes`; inf where none fits."""
    count = len(table.options)
    start: Memory = (frozenset(), frozenset(), count + 1)  # the loss is one more
    best, queue = {start: 0.0}, [(0.0, 0, start)]
    number = 0
    while queue:
        seconds, _, memory = heapq.heappop(queue)
        if memory[2] == 0:
            return seconds
        if seconds > best[memory]:
            continue
        for more, after in _moves(table, budget, memory):
            if seconds + more < best.get(after, np.inf):
                best[after] = seconds + more
                number += 1
                heapq.heappush(queue, (seconds + more, number, after))
    return float(np.inf)


def _moves(table: CostTable, budget: int, memory: Memory) -> Iterator[tuple[float, Memory]]:
    versions, records, left = memory
    (size,) = table.state_bytes.values()
    count = len(table.options)
    held = size * len(versions) + sum(table.options[k][n].preserved_bytes for k, n in records)
    for version in versions - {count - 1}:  # the output stays
        yield 0.0, (versions - {version}, records, left)
    for record in records:
        yield 0.0, (versions, records - {record}, left)
    live = size if left <= count else 0  # the gradient, once the loss has been
    for k in range(min(left, count)):
        if k and k - 1 not in versions:
            continue
        made = versions if k == count - 1 and k in versions else versions | {k}
        for n, cost in enumerate(table.options[k]):
            if held + live + cost.discard_bytes <= budget and k not in versions:
                yield cost.discard_seconds, (made, records, left)
            if held + live + cost.forward_bytes <= budget and (k, n) not in records:
                yield cost.forward_seconds, (made, records | {(k, n)}, left)
            if cost.ending and held + live + cost.ending.bytes <= budget and (k, n) not in records:
                yield cost.ending.seconds, (versions, records | {(k, n)}, left)
    if left == count + 1:
        if count - 1 in versions and held + table.loss_bytes <= budget:
            yield 0.0, (versions, records, count)
        return
    k = left - 1
    if k and k - 1 not in versions:
        return
    for n, cost in enumerate(table.options[k]):
        own = cost.preserved_bytes if (k, n) in records else 0
        need = min(cost.backward(in_graph=True).bytes, cost.backward_bytes)  # whichever pass recorded it
        if (own or (k, n) in records or cost.strategy.in_pieces) and held - own + need <= budget:
            yield cost.backward_seconds, (versions, records - {(k, n)}, left - 1)
