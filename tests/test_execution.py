"""Every submodule, under every strategy it declares: same output, same gradients as whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evoplan.model import Chain
from evoplan.model.build import build_model
from evoplan.model.config import ModelConfig
from evoplan.model.running.dropout import dropout_mask
from evoplan.model.running.execution import record, run_discarded
from evoplan.model.running.kinds import LEAN, WHOLE
from evoplan.model.running.pieces import spans
from evoplan.model.running.runs import WholeRun
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.submodule import IndependentAxis
from tests.conftest import (
    TILES,
    TINY,
    TINY_EXTRA,
    TINY_MSA_MODULE,
    TINY_PAIRFORMER,
    random_inputs,
    randomise,
)

CONFIGS = {"gated": TINY, "global": TINY_EXTRA, "pairformer": TINY_PAIRFORMER, "msa": TINY_MSA_MODULE}


CASES = [
    pytest.param(config, name, id=f"{label}-{name}")
    for label, config in CONFIGS.items()
    for name, _ in build_model(config).blocks[0].submodules()
    if label != "global" or name == "column_attention"
]


def tensors_for(stack, submodule, inputs, seed=3, step=4):
    state, constants = stack.prepare(**{name: t.detach() for name, t in inputs.items()})
    tensors = {name: state[name] for name in submodule.reads}
    tensors |= {name: constants[name] for name in submodule.constants}
    mask = dropout_mask(submodule, tensors[submodule.target], seed, step)
    return tensors if mask is None else {**tensors, "dropout": mask}


def strategies(submodule, tensors):
    yield LEAN
    if submodule.attends:
        for kernel in TILES:
            yield from (replace(WHOLE, kernel=kernel), replace(LEAN, kernel=kernel))
            yield replace(Strategy("chunk", submodule.axes[0].name, 2), kernel=kernel)
    for axis in submodule.axes:
        chunked = isinstance(axis, IndependentAxis)
        size = tensors[submodule.target].shape[axis.cuts[submodule.target]] if chunked else axis.size
        for n in sorted({1, 2, 3, size}):
            if n <= size:
                yield Strategy("chunk" if chunked else "coshard", axis.name, n)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["single", "batch"])
@pytest.mark.parametrize(("config", "name"), CASES)
def test_pieces_equal_whole(config: ModelConfig, name: str, batch: tuple[int, ...]) -> None:
    stack = randomise(build_model(config).double(), seed=1)
    submodule = dict(stack.blocks[0].submodules())[name]
    tensors = tensors_for(stack, submodule, random_inputs(config, batch=batch))
    whole = WholeRun(submodule, WHOLE, tensors)
    output = whole.take_output()
    grad = torch.randn_like(output)
    state_grads, parameter_grads = whole.vjp(grad)
    assert {n for n, g in parameter_grads.items() if g is not None} == set(whole.parameters.all)
    seen = set()
    for strategy in strategies(submodule, tensors):
        seen.add(strategy.kind)
        with torch.no_grad():
            torch.testing.assert_close(
                run_discarded(submodule, strategy, tensors), output, rtol=0, atol=1e-12
            )
        got_state, got_parameters = record(submodule, strategy, tensors)[0].vjp(grad)
        for expected, got in ((state_grads, got_state), (parameter_grads, got_parameters)):
            assert expected.keys() == got.keys()
            for key in expected:
                torch.testing.assert_close(
                    got[key], expected[key], rtol=0, atol=1e-11, msg=f"{strategy} {key}"
                )
    assert seen >= {"lean", "chunk", "coshard"}


def test_dropout_masks_are_each_steps_own_and_keep_the_mean() -> None:
    submodule = build_model(TINY).train().blocks[0].row_attention
    submodule.dropout = 0.25
    target = torch.empty(40, 50, 3, dtype=torch.float64)

    def mask(seed: int, step: int) -> torch.Tensor:
        return dropout_mask(submodule, target, seed, step)

    masks = [mask(seed, step) for seed in (3, 4) for step in range(6)]
    assert torch.equal(masks[1], mask(3, 1))
    for number, one in enumerate(masks):
        assert one.numel() == target.numel() // target.shape[submodule.dropout_shared_dim]
        assert set(one.unique().tolist()) == {0, 1 / 0.75}
        assert abs(float(one.mean()) - 1) < 0.2
        for other in masks[:number]:  # three in eight places differ where masks are independent
            assert 0.1 < float((one != other).double().mean()) < 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pieces_in_half_precision_are_summed_in_single(dtype: torch.dtype) -> None:
    """600 of them, each with a row of one position: the output bias's gradient is the sum of what came in."""
    submodule = build_model(TINY).to(dtype).blocks[0].pair_transition
    g = torch.Generator().manual_seed(0)
    z, grad = (torch.rand(1, 600, 1, TINY.c_z, generator=g).to(dtype) for _ in range(2))
    run, _ = record(submodule, Strategy("chunk", "row", 600), {"z": z})
    (name,) = (name for name in run.parameters.all if name == "linear_2.bias")
    got, exact = run.vjp(grad)[1][name], grad.double().sum(dim=(0, 1, 2))
    assert got.dtype == dtype
    assert float((got.double() / exact - 1).abs().max()) <= torch.finfo(dtype).eps / 2  # rounded once


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_whole_is_the_discarded_run_too(config: ModelConfig) -> None:
    stack = randomise(build_model(config).double())
    inputs = random_inputs(config)
    for submodule in (step.submodule for step in Chain.of(stack).steps):
        tensors = tensors_for(stack, submodule, inputs)
        with torch.no_grad():
            assert torch.equal(
                run_discarded(submodule, WHOLE, tensors), WholeRun(submodule, WHOLE, tensors).take_output()
            )


def test_spans_cover_everything_once() -> None:
    assert [(p.start, p.stop) for p in spans(7, 3)] == [(0, 3), (3, 5), (5, 7)]
    with pytest.raises(ValueError, match="cannot cut 3 into 4"):
        list(spans(3, 4))
