"""Which of the modules that a forward has called are blocks of a stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn

from evoplan.model.foreign.leaves import Layout
from evoplan.model.foreign.visits import Visit

MOST = 0.8  # of a module's parameters that a stack within it has, where the stack's blocks take its place


def blocks_in(root: Visit) -> list[Visit]:
    """The blocks of the outermost stacks of a model, in the order of their calls.

    Stacks of single layers count where there are no others: an embedding's or a head's are small.
    """
    stacks = list(_stacks(root))
    large = [stack for stack in stacks if any(block.children for block in stack)]
    return sorted((block for stack in large or stacks for block in stack), key=lambda block: block.start)


def closing_in(root: Visit, last: Visit) -> list[Visit]:
    """What follows the last block as if it were one: modules that make of what it has returned, as it is, a
    tensor of the same layout. Mostly that is a norm; kept, it and the head after it keep three such tensors.

    A module that is called more than once is none: elsewhere it is something else.
    """
    visits = list(_all(root))
    calls = Counter(visit.module for visit in visits)
    found: list[Visit] = []
    for visit in sorted(visits, key=lambda visit: visit.start):
        before = found[-1] if found else last
        if visit.start >= before.stop and calls[visit.module] == 1 and _goes_on(visit, before):
            found.append(visit)
    return found


def _goes_on(visit: Visit, before: Visit) -> bool:
    """Whether a module makes one tensor, laid out as one that it is given and that another has returned."""
    returned = [key for key in before.out_keys if key is not None]
    given = [leaf for leaf, key in zip(visit.arguments, visit.keys, strict=True) if key in returned]
    made = [leaf for leaf in visit.results if isinstance(leaf, Tensor)]
    trained = any(parameter.requires_grad for parameter in visit.module.parameters())
    fresh = not any(key in visit.keys for key in visit.out_keys if key is not None)
    return (
        trained and fresh and len(made) == 1 and any(Layout.of(leaf) == Layout.of(made[0]) for leaf in given)
    )


def _all(visit: Visit) -> Iterator[Visit]:
    for child in visit.children:
        yield child
        yield from _all(child)


def _stacks(visit: Visit) -> Iterator[list[Visit]]:
    """A stack is what is called of a container: of an nn.Sequential or an nn.ModuleList each member; of any
    other module those children that have siblings of their own class, or that are called again.
    """
    if isinstance(visit.module, nn.Sequential) and len(visit.children) > 1:
        yield [block for child in visit.children for block in _members(child)]
        return
    stacks: dict[object, list[Visit]] = {}
    for child in visit.children:
        stacks.setdefault(_stack_of(visit, child), []).append(child)
    for stack in stacks.values():
        if len(stack) > 1 and any(True for child in stack for _ in child.module.parameters()):
            yield [block for child in stack for block in _members(child)]
        else:
            for child in stack:
                yield from _stacks(child)


def _stack_of(parent: Visit, child: Visit) -> object:
    """Equal for children of one stack."""
    container = child.path.rpartition(".")[0]
    if container != parent.path:  # a list's, since lists are not called
        return container
    return (type(child.module), child.recorded) if child.children else child


def _members(visit: Visit) -> Iterator[Visit]:
    """A member of a stack: itself, unless it is little but a stack of blocks of its own."""
    inner = [block for stack in _stacks(visit) for block in stack]
    modules = {block.module for block in inner}
    # An nn.Sequential beside another is some layers, of which a block is put together.
    whole = (any(True for _ in module.children()) and type(module) is not nn.Sequential for module in modules)
    if len(inner) > 1 and all(whole):
        part = sum(p.numel() for module in modules for p in module.parameters())
        if part >= MOST * sum(p.numel() for p in visit.module.parameters()):
            yield from inner
            return
    yield visit
