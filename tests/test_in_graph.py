"""Steps of which nothing will run again stay in autograd's own graph: what they keep, and until when."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evoplan.cost_model.costs import build_cost_table
from evoplan.cost_model.devices import device
from evoplan.cost_model.fakes import fake_copy
from evoplan.cost_model.simulation import simulated
from evoplan.model.build import build_model
from evoplan.model.programs.loss import mean_square
from evoplan.model.running import runs
from evoplan.model.running.chain import Chain
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.strategy import COMPILED, Strategy
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Run, Sequence
from tests.conftest import random_inputs
from tests.loops import inputs, loss_of, new_stack
from tests.loops import step as training_step
from tests.test_unread import CONFIGS, steps_of
from tests.test_unread_reruns import KINDS, possible

STRATEGIES = {"whole": WHOLE, "lean": LEAN}


def all_under(model: torch.nn.Module, strategy: Strategy) -> Sequence:
    """Every step once, under one strategy where it can."""
    steps, can = Chain.of(model).steps, strategy.kernel == COMPILED
    return Sequence(tuple(Run(s.index, strategy if can or possible(s, strategy) else WHOLE) for s in steps))


def hidden_of(transition: torch.nn.Module) -> list[weakref.ref[torch.UntypedStorage]]:
    """Storages of its input and its hidden channels, before and after their nonlinearity, once it has run."""
    found: list[weakref.ref[torch.UntypedStorage]] = []

    def before(module: torch.nn.Module, args: tuple[Tensor, ...], made: Tensor) -> None:
        found.append(weakref.ref(made.untyped_storage()))

    def after(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(weakref.ref(args[0].untyped_storage()))

    (norm,) = transition.norms.values()
    norm.register_forward_pre_hook(after)
    transition.linear_1.register_forward_hook(before)
    transition.linear_2.register_forward_pre_hook(after)
    return found


def any_lives(storages: list[weakref.ref[torch.UntypedStorage]]) -> bool:
    assert storages  # it has run
    return any(storage() is not None for storage in storages)


@pytest.mark.parametrize("strategy", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_takes_what_was_traced(name: str, strategy: Strategy) -> None:
    """Every backward of a chain, to the byte; the gradients of parameters are there before."""
    config = CONFIGS[name]
    given = random_inputs(config, s=5, r=7)
    shapes = {key: tuple(tensor.shape) for key, tensor in given.items()}
    table = build_cost_table(build_model(config).train(), shapes, "float64", device("cpu"))
    with simulated(device("cpu"), where="meta") as trace:
        model = fake_copy(build_model(config), torch.float64, "meta").train()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        on_meta = {
            key: torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=t.requires_grad)
            for key, t in given.items()
        }
        for tensor in on_meta.values():
            tensor.grad = torch.empty_like(tensor) if tensor.requires_grad else None
        schedule = all_under(model, strategy)
        base = trace.live_bytes
        trace.reset()
        results = PlannedModule(model, schedule)(**on_meta, dropout_seed=3)  # held, as the account has it
        mean_square(*results).backward()
        taken = trace.peak_bytes - base
    # The few numbers of the loss, and Python's that autograd keeps, are rounded up in the account.
    predicted = replay(schedule, table).peak_bytes
    assert predicted - 1024 <= taken <= predicted


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_what_no_gradient_reaches_goes_when_backward_comes_past(strategy: Strategy) -> None:
    """The last block's pair steps, where a loss reads m alone: results are held all the while."""
    stack = new_stack()
    kept = hidden_of(stack.blocks[-1].pair_transition)
    at_the_end: list[bool] = []
    planned = PlannedModule(stack, all_under(stack, strategy))
    given = inputs()
    first = given["m"].requires_grad_()
    first.register_hook(lambda grad: at_the_end.append(not any_lives(kept)))
    m, z = planned(**given)
    assert any_lives(kept)
    loss_of((m,)).backward(retain_graph=True)
    assert at_the_end == [False]  # it may be asked for yet
    loss_of((m,)).backward()
    assert at_the_end == [False, True]
    with pytest.raises(RuntimeError, match=r"pair_transition has no record any more.*retain_graph=True"):
        loss_of((z,)).backward()


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_one_loss_after_the_other(strategy: Strategy) -> None:
    """A later loss on steps that the first one has not reached, and the other way round."""
    stack = new_stack()
    planned = PlannedModule(stack, all_under(stack, strategy))
    for order in ((0, 1), (1, 0)):
        found = []
        for model in (stack, planned):
            results = model(**inputs(), dropout_seed=7)
            losses = [loss_of((results[which],)) for which in order]
            losses[0].backward(retain_graph=True)
            losses[1].backward()
            found.append([p.grad.clone() for p in stack.parameters() if p.grad is not None])
            stack.zero_grad()
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Strategy]:
    """Submodules through torch.compile, with the backend that needs no compiler of C++."""
    run = torch.compile(runs._new_target, backend="aot_eager", dynamic=False, fullgraph=True)
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=256):
        patch.setattr(runs, "_compiled_target", lambda kind, attends: run)
        yield replace(WHOLE, kernel=COMPILED)


def test_a_compiled_step_lets_go_of_what_it_keeps(compiled: Strategy) -> None:
    stack = new_stack()
    planned = PlannedModule(stack, all_under(stack, compiled))
    at_the_end: list[bool] = []
    given = inputs()
    given["m"].requires_grad_().register_hook(lambda grad: at_the_end.append(not any_lives(kept)))
    m, z = planned(**given, dropout_seed=7)
    others = {tensor.untyped_storage()._cdata for tensor in (m, z, *given.values(), *stack.parameters())}
    saved = [tensor.untyped_storage() for tensor in z.grad_fn.saved_tensors]
    kept = [weakref.ref(storage) for storage in saved if storage._cdata not in others]
    del saved
    assert len(kept) > 3
    loss_of((m,)).backward(retain_graph=True)
    loss_of((m,)).backward()
    assert at_the_end == [False, True]
    with pytest.raises(RuntimeError, match="no record any more"):
        loss_of((z,)).backward()


def test_a_compiled_step_sees_what_is_written_into(compiled: Strategy) -> None:
    """And is right where nothing is."""
    stack, found = new_stack(), []
    planned = PlannedModule(stack, all_under(stack, compiled))
    for model in (stack, planned):
        training_step(model, inputs())
        found.append([p.grad.clone() for p in stack.parameters()])
        stack.zero_grad()
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for change in (_in_a_mask, _in_a_parameter):
        given = inputs()
        results = planned(**given)
        change(stack, given)
        with pytest.raises(RuntimeError, match="was changed in place"):
            loss_of(results).backward()


def test_hooks_within_see_tensors_of_the_model_s_own_graph() -> None:
    """A loss on what a layer inside of a submodule makes has its gradient."""
    stack = new_stack()
    planned = PlannedModule(stack, all_under(stack, WHOLE))
    seen: list[Tensor] = []
    layer = stack.blocks[0].msa_transition.linear_1
    layer.register_forward_hook(lambda module, args, made: seen.append(made))
    found = []
    for model in (stack, planned):
        seen.clear()
        results = model(**inputs(), dropout_seed=7)
        (loss_of(results) + seen[0].square().mean()).backward()
        found.append([p.grad.clone() for p in stack.parameters()])
        stack.zero_grad()
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def _in_a_mask(stack: torch.nn.Module, given: dict[str, Tensor]) -> None:
    given["msa_mask"].mul_(0.5)


def _in_a_parameter(stack: torch.nn.Module, given: dict[str, Tensor]) -> None:
    with torch.no_grad():
        stack.blocks[0].msa_transition.linear_2.weight.mul_(2)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(
    ("change", "name"),
    [(_in_a_mask, "msa_mask of blocks"), (_in_a_parameter, r"linear_2\.weight of blocks\.0\.")],
)
def test_who_is_written_into_is_named(change: Callable[..., None], name: str, strategy: Strategy) -> None:
    stack, given = new_stack(), inputs()
    results = PlannedModule(stack, all_under(stack, strategy))(**given)
    change(stack, given)
    with pytest.raises(RuntimeError, match=f"{name}.* was changed in place"):
        loss_of(results).backward()


def test_saved_tensor_hooks_around_the_model_are_theirs() -> None:
    """Whoever packs what autograd saves packs that of a planned model, too."""
    stack = new_stack()
    planned = PlannedModule(stack, all_under(stack, WHOLE))
    training_step(stack, inputs())
    expected = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.nbytes)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = planned(**inputs(), dropout_seed=7)
    assert len(packed) > 9 * len(stack.blocks)
    loss_of(results).backward()
    for parameter, grad in zip(stack.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)


def test_nothing_outlives_the_results() -> None:
    """No circle keeps a graph that nobody has any longer."""
    stack = new_stack()
    for strategy in STRATEGIES.values():
        kept = hidden_of(stack.blocks[0].msa_transition)
        results = PlannedModule(stack, all_under(stack, strategy))(**inputs())
        assert any_lives(kept)
        del results
        assert not any_lives(kept)


@pytest.mark.parametrize(
    "name",
    ["triangle_outgoing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("main", "msa-module"))],
)
def test_submodules_compile_whole(name: str) -> None:
    """Without a break in the graph, with gradients; what it is compiled to is not asked here."""
    found = steps_of(CONFIGS.get(name, CONFIGS["main"]))
    steps = [pair for pair in found if name in CONFIGS or name in pair[0].name]
    assert steps
    for step, tensors in steps:
        of_state = [tensors[key].requires_grad_() for key in step.submodule.reads]
        torch.compiler.reset()
        compiled = torch.compile(
            step.submodule.new_target, backend="aot_eager", fullgraph=True, dynamic=False
        )
        found = []
        for run in (step.submodule.new_target, compiled):
            loss = run(tensors).square().mean()
            found.append([loss, *torch.autograd.grad(loss, [*of_state, *step.submodule.parameters()])])
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
