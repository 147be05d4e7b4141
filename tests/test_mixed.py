"""Mixed precision: forward's precision in everything that runs again, finite masks, peaks as planned."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evoplan import InputShape, TinyOpenFoldConfig
from evoplan.cost_model.scratch import Call, CpuScratch
from evoplan.cost_model.scratch import _run as measured_scratch
from evoplan.cost_model.tensor_spec import TensorSpec
from evoplan.model.modules.attention import mask_bias
from evoplan.model.modules.evoformer import EvoformerStack
from evoplan.planner.checking.verify import simulate_plan, verify_plan
from evoplan.planner.plans.planning import solve
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.solvers import Frontier
from tests.conftest import TINY, TINY_EXTRA
from tests.loops import MODES, assert_same, gradients, inputs, loss_of, new_stack, plan, planned

HALF = [torch.bfloat16, torch.float16]


class Products(TorchDispatchMode):
    """Counts multiply-adds of matrix products by the dtype of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            self.flops[left.dtype] += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, dtype: torch.dtype, inside: bool) -> Counter[torch.dtype]:
    """A step under autocast, its backward inside of it or outside; the products of backward."""
    with torch.autocast("cpu", dtype):
        loss = loss_of(model(**inputs(dtype=torch.float32), dropout_seed=7))
    with Products() as counted, torch.autocast("cpu", dtype, enabled=inside):
        loss.backward()
    return counted.flops


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    "dtype", [HALF[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in HALF[1:])], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_what_runs_again_does_so_in_forwards_precision(mode: str, dtype: torch.dtype, inside: bool) -> None:
    plain, stack = (new_stack(dtype=torch.float32) for _ in range(2))
    model = planned(stack, mode, dtype=torch.float32, autocast=dtype)
    assert set(run(plain, dtype, inside)) == {dtype}
    assert set(run(model, dtype, inside)) == {dtype}
    # Other pieces round otherwise; what ran in another precision would show in float32 as a hundredth of it.
    assert_same(gradients(plain), gradients(model), 3e-2 if mode == "tight" else 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_several_micro_batches_under_one_autocast(mode: str) -> None:
    """A cast that one forward made where nothing is recorded is no other forward's."""
    grads = []
    for model in (new_stack(dtype=torch.float32), None):
        model = model or planned(new_stack(dtype=torch.float32), mode, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                model(**inputs(dtype=torch.float32), dropout_seed=1)
            if isinstance(model, EvoformerStack):
                torch.clear_autocast_cache()  # torch itself would take the casts made without gradient
            total = sum(
                loss_of(model(**inputs(dtype=torch.float32, seed=k), dropout_seed=k)) for k in range(2)
            )
        total.backward()
        grads.append(gradients(model))
    assert_same(*grads, 3e-2)


@pytest.mark.parametrize("mode", MODES)
def test_loss_scaling(mode: str) -> None:
    found = []
    for make in (lambda: new_stack(dtype=torch.float32), None):
        model = make() if make else planned(new_stack(dtype=torch.float32), mode, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model(**inputs(dtype=torch.float32), dropout_seed=7))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            found.append(gradients(model)) if _ == 0 else None
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128.0  # nothing overflowed
    assert_same(*found, 3e-2)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16, "bf16", "fp16"], ids=str)
@pytest.mark.parametrize("mask", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [TINY, TINY_EXTRA], ids=["gated", "global"])
def test_rows_without_any_key(config, mask: torch.dtype, compute: torch.dtype | str) -> None:
    """Every dtype of mask against every precision, rows and columns masked out: all finite, all alike."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(compute))
    dtype = torch.float32 if autocast else compute
    stack = new_stack(config, dtype).eval()
    given = inputs(config, dtype=dtype)
    msa, pair = torch.ones_like(given["msa_mask"]), torch.ones_like(given["pair_mask"])
    msa[:, 3:], msa[:, :, 5:], pair[:, 5:], pair[:, :, 5:] = 0, 0, 0, 0

    def results(of: torch.dtype) -> list[Tensor]:
        stack.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            outputs = stack(given["m"], given["z"], msa_mask=msa.to(of), pair_mask=pair.to(of))
        (loss_of(tuple(x.float() for x in outputs)) / 100).backward()
        return [*(x.detach() for x in outputs), *(p.grad.clone() for p in stack.parameters())]

    found = results(mask)
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    for got, expected in zip(found, results(torch.float32), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("logits", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("mask", [torch.float64, torch.float32, *HALF], ids=str)
def test_a_mask_of_any_dtype_is_finite_in_the_logits(mask: torch.dtype, logits: torch.dtype) -> None:
    """And far below any logit there is."""
    bias = mask_bias(torch.tensor([1, 0, 1], dtype=mask), logits)
    assert bias.dtype == logits
    assert bias.isfinite().all()
    assert bias[[0, 2]].tolist() == [0, 0]
    assert bias[1] <= -3e4
    scores = torch.tensor([-1000, 1000, -1000], dtype=logits)
    assert (scores + bias).isfinite().all()
    assert (scores + bias).softmax(-1).tolist() == [0.5, 0, 0.5]


def test_scratch_of_elementwise_operators_on_unlike_dtypes() -> None:
    aten, wide, half = torch.ops.aten, torch.float32, torch.bfloat16

    def spec(dtype: torch.dtype, *shape: int) -> TensorSpec:
        return TensorSpec.dense(shape, dtype)

    known = CpuScratch()
    for operator, first, second in (
        (aten.add.Tensor, spec(wide, 700), spec(half, 700)),
        (aten.add_.Tensor, spec(half, 700), spec(wide, 700)),
        (aten.add_.Tensor, spec(wide, 700), spec(half, 700)),
        (aten.mul_.Tensor, spec(half, 9, 70), spec(wide, 70)),
        (aten.mul.Tensor, spec(half, 9, 70), spec(wide)),
        (aten.div_.Tensor, spec(half, 9, 70), spec(wide, 9, 1)),
    ):
        call = known.call(operator, (first.ones(), second.ones()))
        assert call is not None
        assert 0 <= known.bytes(call) - measured_scratch(Call(operator, (first, second))) <= 16, operator
    assert known.call(aten.add.Tensor, (torch.ones(3), torch.ones(3))) is None


CASES = {
    "main": (TINY, InputShape(6, 13)),
    "wide": (replace(TINY, c_m=32, c_z=24, n_block=1), InputShape(9, 21, 2)),
    "extra": (TINY_EXTRA, InputShape(40, 11)),
    "tiny": (TinyOpenFoldConfig(n_block=1, c_m=16, c_z=24, c_opm=8), InputShape(7, 19, 2)),
}


SMALL = {
    "small main": (TINY, InputShape(5, 7)),  # as tests above have planned
    "small extra": (TINY_EXTRA, InputShape(9, 4, 2)),
    "small tiny": (TinyOpenFoldConfig(n_block=1, c_m=16, c_z=24, c_opm=8), InputShape(3, 6, 2)),
}
LARGE = [*((case, "bf16-mixed") for case in CASES), ("main", "fp16-mixed")]


@pytest.mark.parametrize(
    ("case", "mixed"),
    [
        ("small main", "fp16-mixed"),
        ("small tiny", "bf16-mixed"),
        *(pytest.param(case, "bf16-mixed", marks=pytest.mark.slow) for case in SMALL if case != "small tiny"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE),
    ],
)
def test_peaks_are_as_planned(case: str, mixed: str) -> None:
    config, shape = (CASES | SMALL)[case]
    problem = Problem(model="custom", config=config, shape=shape, mixed=mixed)
    costed = cost_problem(problem)
    for budget in list(Frontier(costed.table).budgets(2)):
        asked = problem.model_copy(update={"budget_bytes": costed.fixed_bytes + int(budget)})
        found = solve(replace(costed, problem=asked))
        real = verify_plan(None, found, repeats=1)
        assert real.ok, real
        assert real.measured_peak_bytes <= asked.budget_bytes
        assert 0.98 <= real.measured_peak_bytes / real.predicted_peak_bytes <= 1.0
        simulated = simulate_plan(found)
        assert simulated.ok


def test_a_plan_knows_its_precision() -> None:
    assert plan("roomy", dtype=torch.float32, autocast=torch.bfloat16).problem.precision == "bf16-mixed"
    with pytest.raises(ValueError, match="parameters in float32"):
        Problem(model="custom", config=TINY, shape=InputShape(3, 4), dtype="bfloat16", mixed="bf16-mixed")
