"""Tensors without data are traced as real ones are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from evoplan.cost_model.costs import build_cost_table
from evoplan.cost_model.devices import device
from evoplan.cost_model.liveness import Liveness
from evoplan.cost_model.scratch import CpuScratch
from evoplan.cost_model.steps import trace_step
from evoplan.cost_model.trace import Trace
from evoplan.model.build import build_model, model_without_data
from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.model.running.chain import Chain
from evoplan.model.running.pieces import sampled_pieces
from tests.conftest import TINY, TINY_EXTRA, randomise

CONFIGS = {
    "main": replace(TINY, n_block=1),
    "extra": replace(TINY_EXTRA, n_block=1),
    "tiny": TinyOpenFoldConfig(n_block=1, c_m=8, c_z=12, c_opm=3),
}


SHAPES = [InputShape(3, 4), pytest.param(InputShape(5, 9), marks=pytest.mark.slow)]


@pytest.mark.parametrize("shape", SHAPES, ids=["small", "more pieces"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bytes_and_work_are_those_of_real_tensors(config: Any, dtype: str, shape: InputShape) -> None:
    """Also where pieces have one row: there strides decide what is copied, and which kernel runs."""
    shapes = config.state_shapes(shape)
    table = build_cost_table(model_without_data(config), shapes, dtype, device("cpu"))
    with Trace(1, CpuScratch()) as trace, sampled_pieces(trace):
        model = randomise(build_model(config)).to(getattr(torch, dtype)).train()
        chain = Chain.of(model)
        liveness = Liveness(table.step_reads, chain.outputs)
        inputs = {name: torch.randn(size).to(getattr(torch, dtype)) for name, size in shapes.items()}
        state, constants = model.prepare(**inputs)
        for step, options in zip(chain.steps, table.options, strict=True):
            live = tuple(version.tensor for version in liveness.alive(step.index + 1))
            for cost in options:
                real = trace_step(step, cost.strategy, state, constants, trace, live)
                unlike = {
                    name: (value, vars(cost)[name])
                    for name, value in vars(real).items()
                    if value != vars(cost)[name] and not name.endswith("seconds")
                }
                assert not unlike, (step.name, str(cost.strategy))
