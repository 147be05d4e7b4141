"""The last product of a piece that runs again is not made, and nobody misses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evoplan.model.build import build_model
from evoplan.model.config import ModelConfig
from evoplan.model.modules.transition import Transition
from evoplan.model.running import unread
from evoplan.model.running.chain import Chain, Step
from evoplan.model.running.execution import record
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import IndependentAxis, Submodule
from tests.conftest import TINY, TINY_EXTRA, TINY_MSA_MODULE, TINY_PAIRFORMER, random_inputs, randomise

CONFIGS = {"main": TINY, "extra": TINY_EXTRA, "pairformer": TINY_PAIRFORMER, "msa-module": TINY_MSA_MODULE}


def steps_of(config: ModelConfig) -> list[tuple[Step, dict[str, Tensor]]]:
    """Each step of a block, and what it reads; with dropout."""
    model = randomise(build_model(replace(config, n_block=1)).double()).train()
    inputs = {name: t.detach() for name, t in random_inputs(config, s=5, r=7).items()}
    state, constants = model.prepare(**inputs)
    return [(step, step.tensors(state, constants, 3)) for step in Chain.of(model).steps]


def chunked(submodule: Submodule) -> Strategy:
    axis = next(axis for axis in submodule.axes if isinstance(axis, IndependentAxis))
    return Strategy("chunk", axis.name, 3)


def gradients(submodule: Submodule, strategy: Strategy, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the state and of parameters, for one gradient of the new target."""
    run, output = record(submodule, strategy, tensors)
    generator = torch.Generator().manual_seed(1)
    of_state, of_parameters = run.vjp(torch.randn(output.shape, generator=generator, dtype=output.dtype))
    return {**of_state, **of_parameters}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    largest = max(float(grad.abs().max()) for grad in other.values())
    for name, grad in one.items():
        torch.testing.assert_close(grad, other[name], rtol=1e-10, atol=1e-10 * largest, msg=name)


@pytest.fixture
def not_a_number(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is not made is not-a-number, and it is counted how often."""
    made = []
    forward = unread._Unread.forward

    def filled(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append(1)
        return forward(ctx, x, weight, bias).fill_(float("nan"))

    monkeypatch.setattr(unread._Unread, "forward", staticmethod(filled))
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_reads_it(name: str, not_a_number: list[int]) -> None:
    left_out = 0
    for step, tensors in steps_of(CONFIGS[name]):
        expected = gradients(step.submodule, WHOLE, tensors)
        before = len(not_a_number)
        assert_same(gradients(step.submodule, chunked(step.submodule), tensors), expected)
        left_out += len(not_a_number) > before
    assert left_out >= 3  # all but triangle multiplications, whose gate multiplies it


def test_it_costs_nothing() -> None:
    """A transition's is half of its forward."""
    (step, tensors) = next(pair for pair in steps_of(TINY) if isinstance(pair[0].submodule, Transition))
    submodule = step.submodule
    run, output = record(submodule, chunked(submodule), tensors)
    with FlopCounterMode(display=False) as backward:
        run.vjp(torch.ones_like(output))
    with FlopCounterMode(display=False) as forward:
        record(submodule, WHOLE, tensors)
    assert backward.get_total_flops() == 2.5 * forward.get_total_flops()


class Bounded(Transition):
    """What follows the product is not affine, and does not say that it is."""

    def finish(self, update: Tensor, *inputs: Tensor, **_: Tensor) -> Tensor:
        return update.sin()


class Squared(Transition):
    def piece(self, *inputs: Tensor, **others: Tensor) -> Tensor:
        return super().piece(*inputs, **others).square()


class Scaled(Transition):
    def update(self, *inputs: Tensor) -> Tensor:
        return super().update(*inputs).sin()


@pytest.mark.parametrize("kind", [Bounded, Squared, Scaled])
def test_subclasses_that_go_on_are_right(kind: type[Transition], not_a_number: list[int]) -> None:
    (step, tensors) = next(pair for pair in steps_of(TINY) if isinstance(pair[0].submodule, Transition))
    submodule = step.submodule
    submodule.__class__ = kind
    assert_same(gradients(submodule, chunked(submodule), tensors), gradients(submodule, WHOLE, tensors))
    assert not not_a_number


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def hooked(submodule: nn.Module) -> None:
    submodule.attention.register_forward_hook(lambda module, args, output: output.sin())


def patched(submodule: nn.Module) -> None:
    forward = submodule.attention.forward
    submodule.attention.forward = lambda *args, **kwargs: forward(*args, **kwargs).sin()


def patched_piece(submodule: nn.Module) -> None:
    piece = submodule.piece
    submodule.piece = lambda *args, **kwargs: piece(*args, **kwargs).sin()


def another_layer(submodule: nn.Module) -> None:
    submodule.attention.linear_o = nn.Sequential(submodule.attention.linear_o, Sine())


@pytest.mark.parametrize("change", [hooked, patched, patched_piece, another_layer])
def test_what_hangs_on_its_layers_sees_numbers(
    change: Callable[[nn.Module], None], not_a_number: list[int]
) -> None:
    (step, tensors), *_ = steps_of(TINY)
    submodule = step.submodule
    change(submodule)
    assert_same(gradients(submodule, chunked(submodule), tensors), gradients(submodule, WHOLE, tensors))
    assert not not_a_number


@pytest.mark.parametrize("frozen", ["linear_2.weight", "linear_2.bias", "linear_1.weight"])
def test_frozen_parameters_have_no_gradient(frozen: str) -> None:
    (step, tensors) = next(pair for pair in steps_of(TINY) if isinstance(pair[0].submodule, Transition))
    submodule = step.submodule
    submodule.get_parameter(frozen).requires_grad_(False)
    assert_same(gradients(submodule, chunked(submodule), tensors), gradients(submodule, WHOLE, tensors))


def test_a_compiler_sees_one_graph() -> None:
    """As of every submodule that is compiled whole: what asks who reads is not in it."""
    (step, tensors) = next(pair for pair in steps_of(TINY) if isinstance(pair[0].submodule, Transition))
    explained = torch._dynamo.explain(step.submodule.new_target)(tensors)
    assert explained.graph_break_count == 0
