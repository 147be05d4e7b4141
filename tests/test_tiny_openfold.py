"""TinyOpenFold: its parameters, its maths against a version written from the equations, its plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evoplan.cost_model.flops import submodule_flops, tiny_openfold_flops
from evoplan.cost_model.steps import offered_strategies
from evoplan.experiments.flops.counts import COMPONENTS, analytic, by_deepspeed, counted, counted_step
from evoplan.experiments.tiny_openfold.training import Recipe
from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig, preset
from evoplan.model.modules.tiny_openfold import TinyOpenFold, TinyOpenFoldStack
from evoplan.model.programs.tiny_data import tiny_batch
from evoplan.model.running.chain import Chain
from evoplan.model.running.execution import record
from evoplan.model.running.kinds import WHOLE
from evoplan.planner import apply_plan, load_plan, make_plan, verify_plan
from evoplan.planner.plans.planning import NoPlanError
from evoplan.planner.problems.problem import Problem
from tests.conftest import randomise

SMALL = TinyOpenFoldConfig(n_block=2, c_m=12, c_z=8, n_head_msa=3, n_head_pair=2, c_opm=5)


def batch_of(config: TinyOpenFoldConfig, shape: InputShape, dtype=torch.float64) -> dict[str, Tensor]:
    batch = tiny_batch(config, shape, "random", 1, 0)
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


# --- parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count", "tensors"),
    [
        (TinyOpenFoldConfig(), 2_653_760, 255),
        (TinyOpenFoldConfig(n_block=2, c_m=32, c_z=64), 403_744, 129),
        (TinyOpenFoldConfig(n_block=8, c_m=128, c_z=256), 18_984_064, 507),
    ],
    ids=["default", "tiny", "medium"],
)
def test_as_many_parameters_as_the_original(config: TinyOpenFoldConfig, count: int, tensors: int) -> None:
    model = TinyOpenFold(config)
    parameters = list(model.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (count, tensors)


def test_parameters_of_each_part() -> None:
    block = TinyOpenFoldStack(TinyOpenFoldConfig(n_block=1)).blocks[0]
    own = {name: sum(p.numel() for p in module.parameters()) for name, module in block.named_children()}
    # The original's, each with the normalisation that is called before it: 128 on m, 256 on z.
    assert own == {
        "row_attention": 16_896 + 128,
        "column_attention": 16_384 + 128,
        "msa_transition": 32_768 + 128,
        "outer_product_mean": 133_248,
        "triangle_outgoing": 98_560 + 256,
        "triangle_incoming": 98_560 + 256,
        "triangle_starting": 65_792 + 256,
        "triangle_ending": 65_792 + 256,
        "pair_transition": 131_072 + 256,
        "unused_norm": 256,
    }
    assert sum(own.values()) == 660_992


# --- the maths ------------------------------------------------------------------------------


def _attend(x: Tensor, attention, bias: Tensor | None = None) -> Tensor:
    """Along the last axis but one of x [..., n, c]; bias [b, heads, n, n]."""
    heads = attention.n_head
    q, k, v = (
        F.linear(x, getattr(attention, f"linear_{name}").weight).unflatten(-1, (heads, -1)) for name in "qkv"
    )
    scores = torch.einsum("brihc,brjhc->brhij", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias[:, None]
    out = torch.einsum("brhij,brjhc->brihc", scores.softmax(-1), v).flatten(-2)
    return F.linear(out, attention.linear_o.weight)


def _triangle(z: Tensor, part, equation: str) -> Tensor:
    x = part.norms["z"](z)
    a = F.linear(x, part.linear_a.weight) * F.linear(x, part.linear_a_gate.weight).sigmoid()
    b = F.linear(x, part.linear_b.weight) * F.linear(x, part.linear_b_gate.weight).sigmoid()
    product = torch.einsum(equation, a, b)
    return F.linear(product, part.linear_out.weight) * F.linear(x, part.linear_gate.weight).sigmoid()


def _transition(x: Tensor, part) -> Tensor:
    (norm,) = part.norms.values()
    return F.linear(F.linear(norm(x), part.linear_1.weight).relu(), part.linear_2.weight)


def reference(model: TinyOpenFold, tokens: Tensor, pair_features: Tensor) -> Tensor:
    """The model from its equations, nothing shared with the code."""
    m, z = model.msa_embedding.weight[tokens], pair_features @ model.pair_embedding.weight.T
    for block in model.stack.blocks:
        bias = torch.einsum("bijc,hc->bhij", z, block.row_attention.linear_b.weight)
        m = m + _attend(block.row_attention.norms["m"](m), block.row_attention.attention, bias)
        columns = block.column_attention.norms["m"](m).transpose(1, 2)
        m = m + _attend(columns, block.column_attention.attention).transpose(1, 2)
        m = m + _transition(m, block.msa_transition)
        part = block.outer_product_mean
        a = F.linear(part.norms["m"](m), part.linear_a.weight)
        outer = torch.einsum("bsic,bsjd->bijcd", a, a) / m.shape[1]
        z = z + F.linear(outer.flatten(-2), part.linear_out.weight)
        z = z + _triangle(z, block.triangle_outgoing, "bikc,bjkc->bijc")
        z = z + _triangle(z, block.triangle_incoming, "bkic,bkjc->bijc")
        z = z + _attend(block.triangle_starting.norms["z"](z), block.triangle_starting.attention)
        columns = block.triangle_ending.norms["z"](z).transpose(1, 2)
        z = z + _attend(columns, block.triangle_ending.attention).transpose(1, 2)
        z = z + _transition(z, block.pair_transition)
    return torch.sigmoid(z @ model.distance_head.weight.T) * 20


def test_equals_its_equations() -> None:
    model = randomise(TinyOpenFold(SMALL).double())
    batch = batch_of(SMALL, InputShape(5, 7, batch=2))
    expected = reference(model, batch["tokens"], batch["pair_features"])
    got = model(batch["tokens"], batch["pair_features"])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(model(**batch), trained)
    theirs = torch.autograd.grad(F.mse_loss(expected, batch["distances"]), trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("index", range(9))
def test_pieces_equal_whole(index: int) -> None:
    stack = randomise(TinyOpenFoldStack(SMALL).double())
    step = Chain.of(stack).steps[index]
    g = torch.Generator().manual_seed(3)
    shapes = SMALL.state_shapes(InputShape(5, 7, batch=2))
    state = {
        name: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }
    tensors = step.tensors({name: t.detach() for name, t in state.items()}, {}, None)
    offered = offered_strategies(step, shapes[step.target], ("tiled(2MiB)",))
    assert {strategy.kind for strategy in offered} == {"whole", "lean", "chunk", "coshard"}
    whole, output = record(step.submodule, WHOLE, tensors)
    grad = torch.randn(output.shape, generator=g, dtype=torch.float64)
    expected = whole.vjp(grad)
    for strategy in offered[1:]:
        run, found = record(step.submodule, strategy, tensors)
        torch.testing.assert_close(found, output, rtol=0, atol=1e-12, msg=str(strategy))
        for got, wanted in zip(run.vjp(grad), expected, strict=True):
            assert got.keys() == wanted.keys()
            for name in wanted:
                torch.testing.assert_close(
                    got[name], wanted[name], rtol=0, atol=1e-11, msg=f"{strategy} {name}"
                )


# --- plans ----------------------------------------------------------------------------------


def test_a_plan_keeps_its_promise(tmp_path) -> None:
    """From a stack to a file and back, at half of what it takes without."""
    stack = TinyOpenFoldStack(SMALL)
    shapes = SMALL.state_shapes(InputShape(6, 9, batch=2))
    inputs = [torch.empty(shape) for shape in shapes.values()]
    free = make_plan(stack, inputs)
    static = free.predicted.static_bytes
    plan = make_plan(stack, inputs, budget=static + (free.predicted.peak_bytes - static) // 2)
    plan.save(tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    assert isinstance(plan.problem.config, TinyOpenFoldConfig)
    # Nothing trains the norm that nobody reads.
    assert plan.static["parameters"] - plan.static["gradients"] == 2 * 2 * SMALL.c_z * 4
    found = verify_plan(randomise(stack), plan, repeats=1)
    assert found.ok
    assert found.max_gradient_error < 1e-4
    apply_plan(stack, plan)
    with pytest.raises(ValueError, match="the plan is for"):
        apply_plan(TinyOpenFoldStack(replace(SMALL, n_block=1)), plan)


def test_what_cannot_be_planned_is_said() -> None:
    chosen = preset("tiny-openfold")
    with pytest.raises(ValueError, match="plan for 1 rank"):
        Problem(model="tiny-openfold", config=chosen.config, shape=chosen.shape, ranks=2)
    with pytest.raises(ValueError, match="c_m = 50 is no multiple of its 4 heads"):
        TinyOpenFoldConfig(c_m=50)
    with pytest.raises(ValueError, match="drops nothing"):
        chosen.config.with_dropout(0.1)
    inputs = [torch.empty(shape) for shape in SMALL.state_shapes(InputShape(4, 5)).values()]
    with pytest.raises(NoPlanError):
        make_plan(TinyOpenFoldStack(SMALL), inputs, budget=1)


# --- arithmetic -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (TinyOpenFoldConfig(), InputShape(16, 64, batch=4)),
        (TinyOpenFoldConfig(n_block=2, c_m=32, c_z=64), InputShape(8, 32, batch=8)),
        (TinyOpenFoldConfig(n_block=8, c_m=128, c_z=256), InputShape(32, 128, batch=2)),
        (SMALL, InputShape(5, 7, batch=3)),
    ],
    ids=["default", "tiny", "medium", "odd"],
)
def test_counters_agree(config: TinyOpenFoldConfig, shape: InputShape) -> None:
    """By formula, component after component, and all at once: no difference; the parts make the whole."""
    formula, recipe = analytic(config, shape), Recipe(config, shape)
    found, works = counted(recipe)
    assert found == formula
    total = sum(flops.total for flops in formula.values())
    assert counted_step(recipe) == total
    assert sum(work.flops for work in works.values()) == total


def test_deepspeed_agrees() -> None:
    """On matrix products; it adds its estimates of elementwise operators, under a hundredth."""
    pytest.importorskip("deepspeed")
    recipe = Recipe(TinyOpenFoldConfig(n_block=2, c_m=32, c_z=64), InputShape(8, 32, batch=2))
    found = by_deepspeed(recipe)
    assert found.products == sum(flops.forward for flops in analytic(recipe.config, recipe.shape).values())
    assert 0 < found.elementwise < 0.01 * found.products


def test_components_leave_nothing_out() -> None:
    config, shape = TinyOpenFoldConfig(), InputShape(16, 64)
    parts = [part for parts in COMPONENTS.values() for part in parts]
    assert sorted(parts) == sorted(tiny_openfold_flops(config, shape))
    assert set(submodule_flops(config, shape)) <= set(parts)


# --- data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["random", "distance"])
def test_batches_are_made_from_their_number(task) -> None:
    config, shape = TinyOpenFoldConfig(), InputShape(6, 40, batch=3)
    batch = tiny_batch(config, shape, task, 42, 7)
    again, other = tiny_batch(config, shape, task, 42, 7), tiny_batch(config, shape, task, 42, 8)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["tokens"], other["tokens"])
    assert batch["tokens"].shape == (3, 6, 40)
    assert batch["pair_features"].shape == (3, 40, 40, 65)
    distances = batch["distances"]
    assert distances.shape == (3, 40, 40, 1)
    assert 0 <= distances.min() <= distances.max() <= 20


def test_distances_are_those_of_a_smooth_chain() -> None:
    batch = tiny_batch(TinyOpenFoldConfig(), InputShape(16, 40, batch=2), "distance", 1, 0)
    distances = batch["distances"][..., 0]
    torch.testing.assert_close(distances, distances.transpose(1, 2))
    assert distances.diagonal(dim1=1, dim2=2).abs().max() < 1e-2
    steps = distances.diagonal(1, dim1=1, dim2=2)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), rtol=1e-3, atol=1e-3)
    # What is far apart along the chain is further apart in space, and there is something to be learned.
    assert distances.diagonal(8, dim1=1, dim2=2).mean() > 2 * steps.mean()
    assert distances.var() > 10
