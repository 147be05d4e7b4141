"""One forward without data: which modules of a model are blocks, what each is given and from where."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evoplan.model.foreign.attributes import counted_tensors
from evoplan.model.foreign.calls import Argument, Call, Constant, FromState, Made, Passed, Result, Same
from evoplan.model.foreign.finding import blocks_in, closing_in, kept_back
from evoplan.model.foreign.leaves import Key, Layout, Numbers, Value, twins_in
from evoplan.model.foreign.visits import Visit
from evoplan.model.foreign.watching import UNLIKE, Functions, Operator, Watch
from evoplan.model.running.internals import has_hooks, storage_key

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice)


class CaptureError(ValueError):
    """A model cannot be planned; the message says why, and what to do."""


@dataclass(frozen=True)
class Captured:
    """A model as a chain of calls.

    Attributes:
        calls: in the order in which they run.
        outputs: names of the state tensors that are read after the last of them.
        notes: what is left as it is, and why: for people.
        unlike_on_meta: whether operators ran that take other memory on the meta device than elsewhere.
        tables: paths of modules in the blocks that have made tensors at their first call which they keep, in
            attributes or as buffers.
        operators: a digest of all that ran, in the blocks and around them.
    """

    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    unlike_on_meta: bool
    operators: str
    tables: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Equal for models whose blocks are called alike and do the same."""
        told = [(c.name, c.work, str(c.arguments), str(c.results), c.makes) for c in self.calls]
        return hashlib.sha256(repr(told).encode()).hexdigest()


def capture(model: nn.Module, run: Callable[[], Any], others: bool = False) -> Captured:
    """The chain of a model.

    Args:
        model: without data; its modules' forwards are written over, so a copy that nobody needs.
        run: its forward, on tensors without data.
        others: whether something in it draws from Python's or NumPy's generators, so that blocks are to be
            looked at for that.

    Raises:
        CaptureError: no blocks are found, or they are given what cannot be checked.
    """
    before = counted_tensors(model)
    with Watch(model, others) as watch, Functions() as functions:
        result = run()
    if watch.sparse:
        raise CaptureError(
            "an embedding's gradient is sparse (sparse=True), as large as values tell, of which a plan knows "
            "none; have it sparse=False, or freeze it"
        )
    visits = [visit for visit in blocks_in(watch.root) if visit.recorded]
    if len(visits) < 2:
        raise CaptureError(
            f"{type(model).__name__} has no modules that are called one after the other with autograd on: "
            "a plan is for a stack of blocks, in an nn.ModuleList or an nn.Sequential"
        )
    for visit in closing_in(watch.root, visits[-1]):
        if not _is_simple(visit):
            break
        visits.append(visit)
    chain = _wired(visits, watch.operators, pytree.tree_leaves(result))
    if (kept := kept_back(visits, watch.operators)) is not None:
        raise CaptureError(
            f"{kept.path}, or a hook in it, keeps a tensor that a gradient is wanted of afterwards, where it "
            "would be cut off from the rest of the graph: have it return that (of transformers' models: "
            "output_attentions=False)"
        )
    unlike = functions.unlike or any(re.match(UNLIKE, operator.about) for operator in watch.operators)
    told = hashlib.sha256("\n".join(operator.about for operator in watch.operators).encode()).hexdigest()
    tables = tuple(
        path
        for path, count in counted_tensors(model).items()
        if count > before.get(path, 0) and any(f"{path}.".startswith(f"{call.path}.") for call in chain.calls)
    )
    return replace(chain, unlike_on_meta=unlike, operators=told, tables=tables)


def _is_simple(visit: Visit) -> bool:
    """Whether nothing stands in the way of running a module again; of a block that would be an error."""
    leaves = (*visit.arguments, *visit.results)
    return (
        visit.recorded
        and not (visit.hooked or visit.writes or visit.changes or visit.replaces or visit.differentiated)
        and all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves)
        and not any(has_hooks(inner) for inner in visit.module.modules())
    )


def captured_again(captured: Captured, visits: list[Visit]) -> Captured:
    """The same chain as other visits of its blocks have it; what the blocks do is known from the first."""
    latest: dict[str, Key] = {}
    calls = []
    for call, visit in zip(captured.calls, visits, strict=True):
        names = {key.numbers: name for name, key in latest.items()}
        read = {at: names[seen] for at, seen in enumerate(visit.numbers) if seen in names}
        arguments = tuple(_argument(visit, at, read, call.name) for at in range(len(visit.arguments)))
        calls.append(replace(call, arguments=arguments, structure=visit.structure))
        made = [at for at, result in enumerate(call.results) if isinstance(result, Made)]
        for name, at in zip(call.makes, made, strict=True):
            key = visit.out_keys[at]
            assert key is not None  # as it is a tensor
            latest[name] = key
    return replace(captured, calls=tuple(calls), notes=tuple(_notes(calls)))


# --- wiring ------------------------------------------------------------------------------------


def _wired(visits: list[Visit], operators: list[Operator], results: list[Any]) -> Captured:
    versions: dict[Key, tuple[int, int]] = {}  # who has made a tensor: the call, and which of its results
    # The same by numbers: a step is given the tensor that the model has, through which gradients go.
    shown: dict[Numbers | None, tuple[int, int]] = {}
    reads: list[dict[int, tuple[int, int]]] = []  # for each call and argument that is one, which
    last_read: dict[tuple[int, int], int] = {}
    for index, visit in enumerate(visits):
        found = {at: shown[seen] for at, seen in enumerate(visit.numbers) if seen in shown}
        reads.append(found)
        last_read |= dict.fromkeys(found.values(), index)
        for at, key in enumerate(visit.out_keys):
            if key is not None and key not in visit.keys and key not in visit.out_keys[:at]:
                versions[key] = shown[key.numbers] = index, at
    end = len(visits)
    after = operators[visits[-1].stop :]
    storages = {storage_key(leaf) for leaf in results if isinstance(leaf, Tensor)}
    storages = storages.union(*(operator.read for operator in after))
    read_after = [version for key, version in versions.items() if key.numbers[0] in storages]
    last_read |= dict.fromkeys(read_after, end)
    names = _names(visits, versions.values(), last_read)
    calls = tuple(_calls(visits, reads, names, operators))
    return Captured(calls, tuple(names[version] for version in read_after), tuple(_notes(calls)), False, "")


def _names(
    visits: list[Visit], versions: Iterable[tuple[int, int]], last_read: Mapping[tuple[int, int], int]
) -> dict[tuple[int, int], str]:
    """Names in the state: the place among the results, so that blocks that are alike are called alike.

    Of another layout it is another tensor; one that is read after its like has been made again has a name of
    its own.
    """
    versions, layouts = sorted(versions), dict[tuple[int, Layout], str]()
    places: Counter[int] = Counter()
    natural = {}
    for index, at in versions:
        layout = Layout.of(visits[index].results[at])
        if (at, layout) not in layouts:
            layouts[at, layout] = f"out{at}" + f".{places[at]}" * (places[at] > 0)
            places[at] += 1
        natural[index, at] = layouts[at, layout]
    names = {}
    for number, version in enumerate(versions):
        name, later = natural[version], versions[number + 1 :]
        following = next((other[0] for other in later if natural[other] == name), None)
        kept = following is not None and last_read.get(version, version[0]) > following
        names[version] = f"{name}@{version[0]}" if kept else name
    return names


def _calls(
    visits: list[Visit],
    reads: list[dict[int, tuple[int, int]]],
    names: Mapping[tuple[int, int], str],
    operators: list[Operator],
) -> Iterator[Call]:
    seen: dict[str, int] = {}
    for index, (visit, read) in enumerate(zip(visits, reads, strict=True)):
        seen[visit.path] = seen.get(visit.path, 0) + 1
        name = visit.path if seen[visit.path] == 1 else f"{visit.path}#{seen[visit.path]}"
        of_state = {at: names[version] for at, version in read.items()}
        arguments = [_argument(visit, at, of_state, name) for at in range(len(visit.arguments))]
        of_call = {at for other, at in names if other == index}
        results = [_result(visit, at, of_call.__contains__) for at in range(len(visit.results))]
        ran = operators[visit.start : visit.stop]
        if visit.differentiated:
            raise CaptureError(
                f"{name} is differentiated before the model's forward and the loss are over, as for forces "
                "(torch.autograd.grad), and once more after that; leave the model unplanned: "
                "torch.utils.checkpoint(..., use_reentrant=False) around its blocks allows for it"
            )
        if visit.replaces:
            raise CaptureError(
                f"{name} changes {', '.join(visit.replaces[:3])}, which it reads, and which is no buffer: "
                "run again it would change that once more; register it as a buffer"
            )
        assert visit.returned is not None
        yield Call(
            index=index,
            path=visit.path,
            name=name,
            structure=visit.structure,
            arguments=tuple(arguments),
            returned=visit.returned,
            results=tuple(results),
            makes=tuple(names[index, at] for at in range(len(results)) if (index, at) in names),
            changes=visit.changes,
            plain=visit.plain,
            draws=visit.others is not None or any(operator.draws for operator in ran),
            others=visit.others,
            work=hashlib.sha256("\n".join(operator.about for operator in ran).encode()).hexdigest(),
        )


def _argument(visit: Visit, at: int, read: Mapping[int, str], name: str) -> Argument:
    leaf = visit.arguments[at]
    if visit.hooked:
        raise CaptureError(
            f"{name} is called under torch.utils.checkpoint, or other saved-tensor hooks; turn the model's "
            "own checkpointing off: a plan takes its place"
        )
    if visit.writes:
        raise CaptureError(
            f"{name} writes into what it is given, in place, or changes its lists or dictionaries: run again "
            "it would find something else; have it make new ones"
        )
    if at in read:
        return FromState(read[at], Layout.of(leaf), visit.wanted[at], twins_in(visit.arguments).get(at))
    if isinstance(leaf, Tensor):
        return Constant(Layout.of(leaf), visit.wanted[at], twins_in(visit.arguments).get(at))
    if not isinstance(leaf, PLAIN):
        raise CaptureError(
            f"{name} is given a {type(leaf).__name__}, which it may change when it runs; call the model so "
            "that its blocks are given tensors and plain values (of transformers' models: use_cache=False)"
        )
    return Value(leaf)


def _result(visit: Visit, at: int, made: Callable[[int], bool]) -> Result:
    leaf = visit.results[at]
    if made(at):
        storages = [None if key is None else key.numbers[0] for key in visit.keys]
        own = storage_key(leaf)
        tensors = (*visit.module.named_parameters(), *visit.module.named_buffers())
        of = {other: key.numbers[0] for other, key in enumerate(visit.out_keys) if key is not None}
        lie_there = [other for other, storage in of.items() if made(other) and storage == own]
        return Made(
            Layout.of(leaf),
            leaf.requires_grad,
            storages.index(own) if own in storages else None,
            next((name for name, tensor in tensors if storage_key(tensor) == own), None),
            leaf.untyped_storage().nbytes(),
            leaf.storage_offset(),
            None if lie_there[0] == at else [*filter(made, range(at))].index(lie_there[0]),
            len(lie_there),
        )
    key = visit.out_keys[at]
    if key is not None and key in visit.keys:
        return Passed(visit.keys.index(key))
    if key is not None:
        first = visit.out_keys.index(key)
        return Same([at for at in range(first + 1) if made(at)].index(first))
    if not isinstance(leaf, PLAIN):
        raise CaptureError(
            f"{visit.path} returns a {type(leaf).__name__}; have it return tensors, in tuples, lists or "
            "dictionaries"
        )
    return Value(leaf)


def _notes(calls: Sequence[Call]) -> Iterator[str]:
    """What is kept because only the model itself knows how it is made; whose memory is not known."""
    for call in calls[1:]:
        if not call.reads:
            yield (
                f"{call.name} reads nothing that an earlier block has returned as it is: "
                "what is made between them is kept"
            )
    for call in calls:
        if call.others is not None:
            yield (
                f"{call.name} draws from Python's or NumPy's generator: where it does something else for "
                "that, it may take more memory than predicted; have it draw from torch's"
            )
