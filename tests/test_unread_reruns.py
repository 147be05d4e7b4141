"""A whole run that ends a redo leaves out the product whose result nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evoplan.cost_model.costs import build_cost_table
from evoplan.cost_model.devices import device
from evoplan.cost_model.fakes import fake_copy
from evoplan.cost_model.simulation import simulated
from evoplan.cost_model.trace import Trace
from evoplan.model.build import build_model
from evoplan.model.config import ModelConfig
from evoplan.model.modules.transition import Transition
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.chain import Chain, Plannable, Step
from evoplan.model.running.execution import record, record_unread
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from tests.conftest import TINY, random_inputs, randomise
from tests.test_unread import CONFIGS, assert_same, not_a_number, steps_of  # noqa: F401

TILED = replace(WHOLE, kernel="tiled(2MiB)")
KINDS = {"whole": WHOLE, "lean": LEAN, "tiled": TILED, "lean and tiled": replace(TILED, kind="lean")}


def possible(step: Step, strategy: Strategy) -> bool:
    return strategy.kernel == "eager" or step.submodule.attends


@pytest.mark.parametrize("strategy", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_reads_it(name: str, strategy: Strategy, not_a_number: list[int]) -> None:  # noqa: F811
    for step, tensors in steps_of(CONFIGS[name]):
        if not possible(step, strategy):
            continue
        run, output = record(step.submodule, strategy, tensors)
        grad = torch.randn_like(output)
        expected = run.vjp(grad)
        assert not not_a_number
        unread = record_unread(step.submodule, strategy, tensors).vjp(grad)
        triangle = "triangle_outgoing" in step.name or "triangle_incoming" in step.name
        assert len(not_a_number) == (not triangle), step.name  # a gate multiplies the product there
        not_a_number.clear()
        assert_same({**unread[0], **unread[1]}, {**expected[0], **expected[1]})


def planned(model: Plannable, strategy: Strategy, of_blocks: bool) -> PlannedModule:
    """Every submodule, or every block, twice: on the redo under one strategy."""
    chain = Chain.of(model)
    spans = chain.groups if of_blocks else [range(k, k + 1) for k in range(len(chain.steps))]
    bodies = [
        tuple(Run(k, strategy if possible(chain.steps[k], strategy) else WHOLE) for k in span)
        for span in spans
    ]
    return PlannedModule(model, Sequence(tuple(Checkpoint(Sequence(b), (WHOLE,) * len(b)) for b in bodies)))


def all_gradients(
    module: nn.Module, inputs: dict[str, Tensor], casting: Callable[[], object] | None = None
) -> dict[str, Tensor]:
    """Of the inputs and of every parameter, and the loss itself."""
    given = {name: t.detach().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    for parameter in module.parameters():
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=casting is not None):
        loss = mean_square(*module(**given, dropout_seed=3))
    loss.backward()
    named = {name: t.grad for name, t in [*given.items(), *module.named_parameters()] if t.grad is not None}
    return {"loss": loss.detach(), **named}


def stack_of(config: ModelConfig) -> tuple[Plannable, dict[str, Tensor]]:
    return randomise(build_model(config).double()).train(), random_inputs(config, s=5, r=7)


@pytest.mark.parametrize("of_blocks", [False, True], ids=["submodules", "blocks"])
@pytest.mark.parametrize("strategy", KINDS.values(), ids=KINDS)
def test_a_planned_model_has_the_gradients_of_the_model(
    strategy: Strategy,
    of_blocks: bool,
    not_a_number: list[int],  # noqa: F811
) -> None:
    model, inputs = stack_of(TINY)
    expected = all_gradients(model, inputs)
    got = all_gradients(planned(model, strategy, of_blocks), inputs)
    assert not_a_number
    assert_same(got, expected)


def test_the_table_has_what_is_left_out() -> None:
    """FLOPs of a training step are those of the costs, to the last."""
    model, inputs = stack_of(TINY)
    shapes = {name: tuple(t.shape) for name, t in inputs.items()}
    table = build_cost_table(model, shapes, "float64", device("cpu"))
    with FlopCounterMode(display=False) as before:
        model.prepare(**inputs)
    for strategy in (WHOLE, LEAN):
        module = planned(model, strategy, of_blocks=False)
        with FlopCounterMode(display=False) as counted:
            all_gradients(module, inputs)
        predicted, left_out = before.get_total_flops(), 0
        for options in table.options:
            (again,) = (cost for cost in options if cost.strategy == strategy)
            assert again.ending is not None
            predicted += options[0].discard_work.flops + again.ending.work.flops + again.backward_work.flops
            left_out += again.forward_work.flops - again.ending.work.flops
            assert again.ending.seconds <= again.forward_seconds
        assert left_out > 0.1 * predicted / 4
        assert counted.get_total_flops() == predicted


@pytest.mark.parametrize("frozen", ["nothing", "weight", "bias"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_keeps_as_much_and_its_backward_takes_as_much(name: str, frozen: str) -> None:
    """One cost of a backward will do for both."""
    model = build_model(replace(CONFIGS[name], n_block=1))
    with simulated(device("cpu"), where="meta") as trace:
        model = fake_copy(model, torch.float64, "meta").train()
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(not path.endswith(frozen))
        inputs = {
            key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for key, tensor in random_inputs(CONFIGS[name], s=5, r=7).items()
        }
        state, constants = model.prepare(**inputs)
        for step in Chain.of(model).steps:
            for strategy in KINDS.values():
                if possible(step, strategy):
                    tensors = step.tensors(state, constants, 3)
                    full, unread = (taken(step, strategy, tensors, trace, how) for how in (False, True))
                    bias = 8 * state[step.target].shape[-1]
                    assert full[0] == unread[0], (step.name, strategy)
                    # A bias's gradient is there a little sooner or later.
                    assert full[1] - bias <= unread[1] <= full[1], (step.name, strategy)


def taken(
    step: Step, strategy: Strategy, tensors: dict[str, Tensor], trace: Trace, unread: bool
) -> tuple[int, int]:
    """Bytes that a run keeps, and the peak of its backward."""
    base = trace.live_bytes
    if unread:
        run = record_unread(step.submodule, strategy, tensors)
    else:
        run = record(step.submodule, strategy, tensors)[0]
    kept = trace.live_bytes - base
    trace.reset()
    run.vjp(torch.empty_like(tensors[step.submodule.target]))
    return kept, trace.peak_bytes - base


class GoesOn(Transition):
    """Its new target is more than the target and an update."""

    def new_target(self, *tensors: Tensor) -> Tensor:
        return super().new_target(*tensors).sin()


class Heard(Transition):
    """Its call is more than its stages."""

    heard: list[Tensor]

    def forward(self, *state: Tensor, run: Callable[..., Tensor]) -> Tensor:
        made = run(*state)
        self.heard.append(made.detach().clone())
        return made


def test_what_goes_on_after_the_update_is_differentiated_on_numbers(not_a_number: list[int]) -> None:  # noqa: F811
    (step, tensors) = next(pair for pair in steps_of(TINY) if isinstance(pair[0].submodule, Transition))
    step.submodule.__class__ = GoesOn
    run, output = record(step.submodule, WHOLE, tensors)
    expected = run.vjp(torch.ones_like(output))
    got = record_unread(step.submodule, WHOLE, tensors).vjp(torch.ones_like(output))
    assert_same({**got[0], **got[1]}, {**expected[0], **expected[1]})
    assert not not_a_number


@pytest.mark.parametrize("how", ["hook", "subclass", "instance"])
def test_whoever_hangs_on_a_submodule_sees_numbers(how: str, not_a_number: list[int]) -> None:  # noqa: F811
    model, inputs = stack_of(TINY)
    expected = all_gradients(model, inputs)
    transition = next(s.submodule for s in Chain.of(model).steps if isinstance(s.submodule, Transition))
    seen: list[Tensor] = []
    if how == "hook":
        transition.register_forward_hook(lambda module, args, made: seen.append(made.detach().clone()))
    elif how == "subclass":
        transition.__class__, transition.heard = Heard, seen
    else:
        forward = transition.forward

        def patched(*state: Tensor, run: Callable[..., Tensor]) -> Tensor:
            made = forward(*state, run=run)
            seen.append(made.detach().clone())
            return made

        transition.forward = patched
    got = all_gradients(planned(model, WHOLE, of_blocks=False), inputs)
    assert_same(got, expected)
    assert len(seen) == 2  # it runs twice, and both times it makes the same
    torch.testing.assert_close(seen[0], seen[1])
    assert not_a_number  # of the others


def test_under_autocast_it_is_all_made(not_a_number: list[int]) -> None:  # noqa: F811
    """autocast casts what a product reads, which a stand-in would have to do as well."""
    model, inputs = stack_of(TINY)
    model = model.float()
    inputs = {name: t.detach().float().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    expected = all_gradients(model, inputs, torch.autocast)
    got = all_gradients(planned(model, WHOLE, of_blocks=False), inputs, torch.autocast)
    assert not not_a_number
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=0, msg=name)
