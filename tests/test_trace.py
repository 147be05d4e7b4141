"""Tensors without data are traced as real ones are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from evoplan.cost_model import simulation
from evoplan.cost_model.costs import build_cost_table
from evoplan.cost_model.devices import device
from evoplan.cost_model.fakes import fake_tensors
from evoplan.cost_model.liveness import Liveness
from evoplan.cost_model.meta_calls import MetaCalls
from evoplan.cost_model.scratch import CpuScratch
from evoplan.cost_model.steps import trace_step
from evoplan.cost_model.trace import Trace
from evoplan.model.build import build_model, model_without_data
from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.model.running.chain import Chain
from evoplan.model.running.pieces import sampled_pieces
from tests.conftest import TINY, TINY_EXTRA, TINY_MSA_MODULE, TINY_PAIRFORMER, randomise

CONFIGS = {
    "main": replace(TINY, n_block=1),
    "extra": replace(TINY_EXTRA, n_block=1),
    "tiny": TinyOpenFoldConfig(n_block=1, c_m=8, c_z=12, c_opm=3),
    "pairformer": replace(TINY_PAIRFORMER, n_block=1),
    "msa module": replace(TINY_MSA_MODULE, n_block=1, last_m=True),
}


SHAPES = [(3, 4), pytest.param((5, 9), marks=pytest.mark.slow)]


@pytest.mark.parametrize("shape", SHAPES, ids=["small", "more pieces"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bytes_and_work_are_those_of_real_tensors(config: Any, dtype: str, shape: tuple[int, int]) -> None:
    """Also where pieces have one row: there strides decide what is copied, and which kernel runs."""
    rows, residues = shape
    reads_rows = any("seq" in dims for dims in config.state.values())
    shapes = config.state_shapes(InputShape(rows if reads_rows else None, residues))
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
                untimed = replace(cost, unread=cost.unread and cost.unread._replace(seconds=0.0))
                unlike = {
                    name: (value, vars(untimed)[name])
                    for name, value in vars(real).items()
                    if value != vars(untimed)[name] and not name.endswith("seconds")
                }
                assert not unlike, (step.name, str(cost.strategy))


@pytest.mark.slow
def test_what_is_made_again_is_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs with operators' results remembered, in a cache that others have filled, and with none."""
    config = CONFIGS["main"]
    shapes = config.state_shapes(InputShape(3, 4))
    monkeypatch.setenv("EVOPLAN_TRACES", "")

    def costs(*about: Any) -> tuple:
        dtype, where, autocast = about
        model = model_without_data(config)
        return build_cost_table(model, shapes, dtype, device(where), autocast=autocast).options

    # Under autocast tensors are fake; else they are on the meta device.
    for about in (("bfloat16", "cpu", None), ("float32", "cpu", "bfloat16")):
        remembered = costs(*about)
        with monkeypatch.context() as patched:
            patched.setattr(simulation, "_CALLS", lambda func, args, kwargs: func(*args, **kwargs))
            assert costs(*about) == remembered


def test_fake_tensors_are_made_again_where_they_were() -> None:
    """And of their own mode; what is known to hold a value is worked out every time."""
    calls, aten = MetaCalls(), torch.ops.aten
    with fake_tensors() as mode:
        number, x = torch.tensor(2), torch.empty(4, 6).t()
        for _ in range(2):
            made = calls(aten.mul.Tensor, (x, 0.5), {})
            assert isinstance(made, FakeTensor)
            assert (made.fake_mode, made.fake_device.type) == (mode, "cpu")
            assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)
            assert len(calls._known) == 1
        assert calls(aten.add.Tensor, (number, number), {}).item() == 4
        assert len(calls._known) == 1
    with fake_tensors() as another:
        assert calls(aten.mul.Tensor, (torch.empty(4, 6).t(), 0.5), {}).fake_mode is another


def test_what_is_written_in_place_is_worked_out_once() -> None:
    """Elementwise: what may grow, and what does not fit, is asked every time."""
    calls, aten = MetaCalls(), torch.ops.aten
    for _ in range(3):
        x = torch.empty(4, 6, device="meta")
        assert calls(aten.add_.Tensor, (x, torch.empty(6, device="meta")), {}) is x
        assert calls(aten.mul_.Scalar, (x, 2), {}) is x
        assert calls(aten.resize_.default, (x, [8, 6]), {}).shape == (8, 6)
        assert calls(aten.t_.default, (x,), {}).shape == (6, 8)
        assert len(calls._known) == 2
        with pytest.raises(RuntimeError):
            calls(aten.add_.Tensor, (x, torch.empty(5, device="meta")), {})


def test_what_shares_its_input_is_not_made_again() -> None:
    """Whatever a schema says: `_unsafe_view` has none of a view, and is one."""
    calls, x = MetaCalls(), torch.empty(4, 6, device="meta")
    product, view = torch.ops.aten.mm.default, torch.ops.aten._unsafe_view.default
    for _ in range(3):
        made = calls(product, (x, x.t()), {})
        assert made.shape == (4, 4)
        assert calls(view, (made, (2, 8)), {}).untyped_storage()._cdata == made.untyped_storage()._cdata
        assert calls(torch.ops.aten.add.Tensor, (x, 1), {}).dtype == torch.float32
    whole = torch.empty(3, dtype=torch.int64, device="meta")
    dtypes = [calls(torch.ops.aten.mul.Tensor, (whole, by), {}).dtype for by in (1, 1.0, True, 1.0, 1)]
    assert dtypes == [torch.int64, torch.float32, torch.int64, torch.float32, torch.int64]
    remembered = len(calls._known)
    assert calls(torch.ops.aten.mul.Tensor, (whole, torch.tensor(2)), {}).dtype == torch.int64
    assert len(calls._known) == remembered  # not by a number that is a tensor
    torch.set_default_dtype(torch.float64)
    try:
        assert calls(torch.ops.aten.mul.Tensor, (whole, 1.0), {}).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
