"""Kernels that other people wrote: used only where they were measured and found to be the formula."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from evoplan.cost_model.profile import bytes_taken, with_data
from evoplan.cost_model.steps import opaque_strategies
from evoplan.model import EvoformerConfig, InputShape
from evoplan.model.running.chain import Chain
from evoplan.model.running.fused import (
    KernelError,
    cuequivariance_attention,
    deepspeed_attention,
    sdpa_attention,
)
from evoplan.model.running.kernels import KERNELS, Kernel, kernel
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import COMPILED, Strategy
from evoplan.planner import verify_plan
from evoplan.planner.checking.profiling import profile_problem
from evoplan.planner.checking.trial import random_inputs
from evoplan.planner.checking.verify import simulate_plan
from evoplan.planner.plans.plan import SolverReport
from evoplan.planner.plans.planning import plan_of
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.problems.timing import cost_with_times
from evoplan.planner.schedules.schedule import Run, Sequence
from tests.test_kernels import attention_inputs, formula

CONFIG = EvoformerConfig(n_block=1, c_m=16, c_z=16, n_head_msa=2, n_head_pair=2, c_head=8, c_opm=4, c_tri=16)
PROBLEM = Problem(model="custom", config=CONFIG, shape=InputShape(24, 17))
SDPA = Strategy(kernel="sdpa")


def gradients(function, leaves, *rest):
    return torch.autograd.grad(function(*leaves[:3], *rest).square().mean(), leaves)


def test_torchs_fused_attention_is_the_formula_where_it_may_be_used() -> None:
    q, k, v, mask, bias = attention_inputs((2,), rows=4, n=33, c=8)
    mask[..., 0, :2] = 0.0  # a row without any key
    torch.testing.assert_close(sdpa_attention(q, k, v, mask, None), formula(q, k, v, mask, None))
    for got, true in zip(
        gradients(sdpa_attention, [q, k, v], mask, None),
        gradients(formula, [q, k, v], mask, None),
        strict=True,
    ):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(sdpa_attention(q, k, v, mask, bias), formula(q, k, v, mask, bias))
    with pytest.raises(KernelError, match="gives the bias no gradient"):
        sdpa_attention(q, k, v, mask, bias)


def library(monkeypatch: pytest.MonkeyPatch, name: str, **functions) -> None:
    """A module that can be imported under that name."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:count]))
        module.__spec__ = object()
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for function, does in functions.items():
        setattr(module, function, does)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_libraries_are_called_as_they_say(
    batch: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins written to the libraries' own descriptions of their arguments."""

    def triangle_attention(q, k, v, bias, mask=None, scale=None):
        logits = scale * (q @ k.transpose(-1, -2)) + bias  # [b, n, h, q, k] + [b, 1, h, q, k]
        return torch.where(mask, logits, -1e9).softmax(-1) @ v

    def evoformer_attention(q, k, v, biases):
        q, k, v = (x.transpose(-2, -3) for x in (q, k, v))  # from [b, n, s, h, d]
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        for bias in biases:
            logits = logits if bias is None else logits + bias
        return (logits.softmax(-1) @ v).transpose(-2, -3)

    library(monkeypatch, "cuequivariance_torch", triangle_attention=triangle_attention)
    library(monkeypatch, "deepspeed.ops.deepspeed4science", DS4Sci_EvoformerAttention=evoformer_attention)
    q, k, v, mask, bias = attention_inputs(batch)
    mask[..., 0, :2] = 0.0
    bias = bias if biased else None
    true = formula(q, k, v, mask, bias)
    torch.testing.assert_close(cuequivariance_attention(q, k, v, mask, bias), true)
    with pytest.raises(KernelError, match=r"half precision, not in torch.float64"):
        deepspeed_attention(q, k, v, mask, bias)
    half = [x if x is None else x.to(torch.bfloat16) for x in (q, k, v, mask, bias)]
    got = deepspeed_attention(*half)
    torch.testing.assert_close(got.double(), true, rtol=0.05, atol=0.05)


def test_a_library_that_is_not_there_is_skipped_with_a_word() -> None:
    assert KERNELS["cuequivariance"].missing == "cuequivariance_torch is not installed"
    with pytest.raises(KernelError, match="kernel deepspeed cannot be used here: deepspeed is not installed"):
        kernel("deepspeed")


def test_profile_keeps_what_is_exact_and_refuses_what_is_not(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path_factory.mktemp("fused") / "times.sqlite")

    def without_bias(q, k, v, mask, bias):
        return formula(q, k, v, mask, None)

    def one_that_fails(q, k, v, mask, bias):
        raise RuntimeError("no such kernel image\nsome more")

    def without_gradients(q, k, v, mask, bias):
        out = formula(q, k, v, mask, bias)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * float("nan"))
        return out

    absent = Kernel("absent", formula, ("cpu",), opaque=True, needs="no_such_module")
    broken = Kernel("broken", one_that_fails, ("cpu",), opaque=True)
    nan = Kernel("nan", without_gradients, ("cpu",), opaque=True)
    for found in (Kernel("wrong", without_bias, ("cpu",), opaque=True), nan, absent, broken):
        monkeypatch.setitem(KERNELS, found.name, found)
    measured, _, _ = profile_problem(PROBLEM, path, repeats=1, max_pieces=1)
    reasons: dict[str, set] = {}
    for row in measured:
        kind = row.step.name.rpartition(".")[2]
        reasons.setdefault(f"{row.strategy.kernel} {kind}", set()).add(row.reason)
    assert reasons["sdpa column_attention"] == {None}
    (said,) = reasons["sdpa row_attention"]
    assert "gives the bias no gradient" in said
    assert reasons["wrong column_attention"] == {None}  # there is no bias to drop
    assert all("it is off by" in said for said in reasons["wrong triangle_ending"])
    assert reasons["nan row_attention"] == {"it is off by nan"}
    assert reasons["absent row_attention"] == {"no_such_module is not installed"}
    assert reasons["broken row_attention"] == {"no such kernel image"}

    costed = cost_with_times(PROBLEM, "measured", path)
    offered = [{str(cost.strategy) for cost in options} for options in costed.table.options]
    names = [step.name for step in Chain.of(costed.model).steps]
    assert {"whole+sdpa", "lean+sdpa", "whole+wrong"} <= offered[names.index("blocks.0.column_attention")]
    assert not any("sdpa" in text for text in offered[names.index("blocks.0.row_attention")])
    traced = cost_problem(PROBLEM)
    assert not any(cost.strategy.kernel == "sdpa" for options in traced.table.options for cost in options)


def test_a_plan_with_a_measured_kernel_keeps_its_promise(tmp_path) -> None:
    path = str(tmp_path / "times.sqlite")
    profile_problem(PROBLEM, path, repeats=1, max_pieces=1)
    costed = cost_with_times(PROBLEM, "measured", path)
    runs = [
        Run(step.index, SDPA if step.name.endswith("column_attention") else WHOLE)
        for step in Chain.of(costed.model).steps
    ]
    plan = plan_of(costed, Sequence(tuple(runs)), SolverReport(name="by hand", seconds=0.0))
    found = verify_plan(None, plan)
    assert found.ok
    assert found.measured_peak_bytes <= found.predicted_peak_bytes
    assert found.max_gradient_error < 1e-5
    with pytest.raises(ValueError, match="runs sdpa, which cannot be simulated; leave --simulate out"):
        simulate_plan(plan)


@pytest.mark.slow
def test_torch_compile_is_measured_like_a_kernel() -> None:
    """Exact, differentiable in everything, and its memory known from the allocator."""
    costed = cost_problem(PROBLEM)
    inputs = random_inputs(PROBLEM, PROBLEM.state_shapes() | PROBLEM.mask_shapes())
    with torch.no_grad():
        state, constants = costed.model.prepare(**inputs)
    step = with_data(Chain.of(costed.model).steps[2], torch.float32, "cpu")
    compiled = replace(WHOLE, kernel=COMPILED)
    assert compiled in opaque_strategies(step, state["m"].shape, "cpu")
    taken = [bytes_taken(step, strategy, state, constants) for strategy in (WHOLE, compiled)]
    assert 0 < taken[1].preserved <= 1.1 * taken[0].preserved
