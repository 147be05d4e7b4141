"""Training loops as people write them: gradients under a plan are those without one."""

from __future__ import annotations

import copy
import io
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from evoplan import EvoformerStack, apply_plan, make_plan
from evoplan.model.running.unchanged import ChangedError
from tests.conftest import TINY, TINY_EXTRA
from tests.loops import (
    MODES,
    assert_same,
    compare,
    gradients,
    inputs,
    loss_of,
    new_stack,
    plan,
    planned,
    step,
)
from tests.torchrun import launched

pytestmark = pytest.mark.parametrize("mode", MODES)


def test_a_tight_plan_runs_everything_again(mode: str) -> None:
    """Else these tests would test nothing."""
    written = str(plan(mode).to_json()["schedule"])
    assert ("checkpoint" in written) == ("chunk" in written) == (mode == "tight")


@pytest.mark.parametrize("given", [(), ("m",), ("z",), ("m", "z")], ids=str)
def test_inputs_with_and_without_gradient(mode: str, given: tuple[str, ...]) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        tensors = inputs()
        leaves = {name: tensors[name].requires_grad_() for name in given}
        step(model, tensors)
        return gradients(model, **leaves)

    compare(mode, loop)


def _freeze(stack: EvoformerStack, kept: str) -> EvoformerStack:
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(
            {
                "all": True,
                "one": name == "blocks.0.triangle_incoming.linear_b.weight",
                "biases": name.endswith("bias"),
                "norms": ".norm" in name,
                "no norms": ".norm" not in name,
                "last block": name.startswith("blocks.1"),
                "first block": name.startswith("blocks.0"),
                "no attention": "attention" not in name,
                "outer product": "outer_product" in name,
            }[kept]
        )
    return stack


PATTERNS = [
    "one",
    "biases",
    "norms",
    "no norms",
    "last block",
    "first block",
    "no attention",
    "outer product",
]


@pytest.mark.parametrize("kept", PATTERNS)
def test_frozen_parameters(mode: str, kept: str) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        step(model, inputs())
        return gradients(model)

    compare(mode, loop, make=lambda: _freeze(new_stack(), kept))


def test_frozen_first_blocks_are_not_kept(mode: str) -> None:
    """Nothing of them is differentiated, so nothing of them waits for backward."""
    frozen = planned(_freeze(new_stack(), "last block"), mode)
    kept = []
    hook = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hook:
        loss = loss_of(frozen(**inputs(), dropout_seed=7))
    whole = len(kept)
    kept.clear()
    with hook:
        loss = loss_of(planned(new_stack(), mode)(**inputs(), dropout_seed=7))
    assert loss.requires_grad
    if mode == "roomy":
        assert whole < 0.6 * len(kept)


def test_accumulation_and_clipping(mode: str) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        for micro in range(4):
            step(model, inputs(seed=micro))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return gradients(model)

    compare(mode, loop)


def test_an_optimizer_between_steps(mode: str) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for number in range(3):
            optimizer.zero_grad()
            step(model, inputs(seed=number))
            optimizer.step()
        return gradients(model)

    compare(mode, loop, error=1e-9)


def test_an_optimizer_in_backward(mode: str) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        def update(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter.add_(parameter.grad, alpha=-1e-3)

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        step(model, inputs())
        return gradients(model)

    compare(mode, loop)


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_on_one_output(mode: str, which: int) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        model(**inputs(), dropout_seed=7)[which].square().mean().backward()
        return gradients(model)

    compare(mode, loop)


def test_a_loss_on_a_slice_and_one_that_is_a_sum(mode: str) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        m, z = model(**inputs(), dropout_seed=7)
        (m[:, 0].sum() + z[:, :, 2].sum()).backward()
        return gradients(model)

    compare(mode, loop)


def test_several_backwards(mode: str) -> None:
    def two_losses(model: nn.Module) -> dict[str, Tensor | None]:
        m, z = model(**inputs(), dropout_seed=7)
        m.square().mean().backward(retain_graph=True)
        z.square().mean().backward()
        return gradients(model)

    def for_the_log(model: nn.Module) -> dict[str, Tensor | None]:
        tensors = inputs()
        tensors["m"].requires_grad_()
        loss = loss_of(model(**tensors, dropout_seed=7))
        (first,) = torch.autograd.grad(loss, tensors["m"], retain_graph=True)
        again = torch.autograd.grad(loss, tensors["m"], retain_graph=True)[0]
        assert torch.equal(first, again)
        loss.backward()
        assert torch.equal(first, tensors["m"].grad)
        return gradients(model)

    compare(mode, two_losses)
    compare(mode, for_the_log)


def test_a_second_backward_without_the_graph_says_what_to_do(mode: str) -> None:
    loss = loss_of(planned(new_stack(), mode)(**inputs(), dropout_seed=7))
    out = torch.autograd.grad(loss, list(new_stack().parameters()), allow_unused=True)
    assert set(out) == {None}  # parameters of another model
    model = planned(new_stack(), mode)
    first, second = (loss_of(model(**inputs(), dropout_seed=7)) for _ in range(2))
    m, z = model(**inputs(), dropout_seed=7)
    m.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        z.sum().backward()
    (first + second).backward()  # two forwards, one backward


def test_a_gradient_of_a_gradient_is_refused(mode: str) -> None:
    tensors = inputs()
    tensors["m"].requires_grad_()
    loss = loss_of(planned(new_stack(), mode)(**tensors, dropout_seed=7))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, tensors["m"], create_graph=True)


def test_recycling(mode: str) -> None:
    """Three passes without gradient, one with; then one through two passes."""

    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        tensors = inputs()
        for _ in range(3):
            with torch.no_grad():
                tensors["m"], tensors["z"] = model(**tensors, dropout_seed=3)
        step(model, tensors)
        tensors["m"], tensors["z"] = model(**tensors, dropout_seed=4)
        step(model, tensors)
        return gradients(model)

    compare(mode, loop, error=1e-10)


class Network(nn.Module):
    """An embedding, two stacks and a head."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, TINY.c_m).double()
        self.first, self.second = first, second
        self.head = nn.Linear(TINY.c_z, 1).double()
        with torch.no_grad():
            for parameter in (*self.embedding.parameters(), *self.head.parameters()):
                parameter.fill_(0.1)

    def forward(self, features: Tensor, z: Tensor) -> Tensor:
        m, z = self.first(self.embedding(features), z, dropout_seed=1)
        _, z = self.second(m, z, dropout_seed=2)
        return self.head(z).square().mean()


def test_several_stacks_in_one_model(mode: str) -> None:
    def run(wrap) -> dict[str, Tensor | None]:
        model = Network(wrap(new_stack(seed=1)), wrap(new_stack(seed=2)))
        model(inputs()["m"][..., :4], inputs()["z"]).backward()
        return gradients(model)

    assert_same(run(lambda stack: stack), run(lambda stack: planned(stack, mode)))


def test_shared_blocks_and_shared_weights(mode: str) -> None:
    def make() -> EvoformerStack:
        stack = new_stack()
        first, second = stack.blocks
        second.row_attention.linear_b.weight = first.row_attention.linear_b.weight
        second.pair_transition = first.pair_transition
        return stack

    def one_block() -> EvoformerStack:
        stack = new_stack()
        stack.blocks[1] = stack.blocks[0]
        return stack

    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        step(model, inputs())
        return gradients(model)

    for shared in (make, one_block):
        assert_same(loop(shared()), loop(_quietly(shared(), mode)))


def _quietly(stack: EvoformerStack, mode: str) -> nn.Module:
    from evoplan.planner.execution.apply import PlannedModule

    return PlannedModule(stack, plan(mode).schedule)


@pytest.mark.parametrize(
    ("config", "s", "r", "batch"),
    [(TINY, 5, 7, 3), (TINY, 1, 1, 1), (TINY, 1, 6, 2), (TINY_EXTRA, 9, 4, 2)],
    ids=["batch", "one of each", "one sequence", "extra"],
)
def test_sizes(mode: str, config, s: int, r: int, batch: int) -> None:
    size = {"config": config, "s": s, "r": r, "batch": batch}

    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        step(model, inputs(**size))
        return gradients(model)

    compare(mode, loop, make=lambda: new_stack(config), **size)


@pytest.mark.parametrize("way", ["clip", "pad", "plan"])
def test_changing_shapes(mode: str, way: str) -> None:
    """A crop of another size at every step; the plan is for the largest."""
    config = replace(TINY, dropout_msa=0.0, dropout_pair=0.0)
    size = {"config": config, "s": 6, "r": 8, "dtype": torch.float64}
    roomier = replace_budget(plan(mode, **size))
    model = apply_plan(new_stack(config), roomier, other_shapes=way)
    plain = new_stack(config)
    sizes = ((6, 8), (3, 5)) if way == "plan" else ((6, 8), (5, 8), (3, 5), (6, 3))
    for s, r in sizes:
        tensors = inputs(config, s, r)
        masks = tensors["msa_mask"][..., None], tensors["pair_mask"][..., None]
        for each in (plain, model):  # where a mask is 0 a row without any key attends to padding, too
            outputs = zip(each(**tensors), masks, strict=True)
            loss_of(tuple(output * mask for output, mask in outputs)).backward()
    assert_same(gradients(plain), gradients(model), 1e-10)


def replace_budget(found):
    """The same with room for padding beside the inputs."""
    if found.problem.budget_bytes is None:
        return found
    problem = found.problem.model_copy(update={"budget_bytes": found.problem.budget_bytes + 100_000})
    return found.model_copy(update={"problem": problem})


def test_other_shapes_are_refused_with_the_ways_out(mode: str) -> None:
    stack = new_stack()
    with pytest.raises(ValueError, match=r"for m of shape \(1, 5, 7, 12\), not \(1, 4, 7, 12\); .*'plan'"):
        planned(stack, mode)(**inputs(s=4))
    two = apply_plan(stack, [plan(mode), plan(mode, s=6, r=8)])
    with pytest.raises(ValueError, match="the plans are for"):
        two(**inputs(s=9))
    step(two, inputs(s=6, r=8))
    step(two, inputs())
    with pytest.raises(ValueError, match="no plan is as large"):
        apply_plan(stack, plan(mode), other_shapes="clip")(**inputs(s=9))


def test_copies(mode: str) -> None:
    """deepcopy, pickle and snapshots: the copy is whole, under the same plan, by the same names."""
    model = planned(new_stack(), mode)
    plain = new_stack(seed=3)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    twin = copy.deepcopy(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    step(plain, inputs())
    for other in (twin, loaded):
        other.load_state_dict(plain.state_dict())
        step(other, inputs())
        assert_same(gradients(plain), gradients(other))
    assert all(parameter.grad is None for parameter in model.parameters())
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, inputs())
    optimizer.step()
    torch.optim.AdamW(plain.parameters()).load_state_dict(optimizer.state_dict())


def test_an_average_of_models(mode: str) -> None:
    model = planned(new_stack(), mode)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, _: old)
    other = planned(new_stack(seed=4), mode)
    average.update_parameters(other)
    average.update_parameters(model)
    with torch.no_grad():
        expected = new_stack(seed=4)(**inputs(), dropout_seed=1)
        for a, b in zip(expected, average(**inputs(), dropout_seed=1), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_modes(mode: str) -> None:
    stack = new_stack()
    model = planned(stack, mode)
    assert model.eval().training is stack.training is False
    torch.manual_seed(0)
    with torch.no_grad():
        a, b = model(**inputs()), model(**inputs())
    assert torch.equal(a[0], b[0])  # nothing is dropped
    stack.train()
    assert model.training


def test_anomaly_mode(mode: str) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        compare(mode, lambda model: (step(model, inputs()), gradients(model))[1])


def test_two_threads(mode: str) -> None:
    """Two threads train two planned models, and run forward on one of them together."""
    models = [planned(new_stack(), mode) for _ in range(2)]
    shared = planned(new_stack(), mode)
    failures = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                step(models[number], inputs(seed=number))
                torch.autograd.grad(loss_of(shared(**inputs(), dropout_seed=7)), list(shared.parameters()))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for number, model in enumerate(models):
        plain = new_stack()
        for _ in range(3):
            step(plain, inputs(seed=number))
        assert_same(gradients(plain), gradients(model))


def test_inputs_laid_out_otherwise(mode: str) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        tensors = inputs()
        leaf = tensors["z"].transpose(1, 2).contiguous().requires_grad_()
        tensors["z"], tensors["m"] = leaf.transpose(1, 2), tensors["m"].expand(1, -1, -1, -1)
        step(model, tensors)
        return gradients(model, z=leaf)

    assert_same(loop(new_stack()), loop(apply_plan(new_stack(), replace_budget(plan(mode)))))


def test_no_room_for_inputs_laid_out_otherwise(mode: str) -> None:
    tensors = inputs()
    tensors["z"] = tensors["z"].transpose(1, 2).contiguous().transpose(1, 2)
    if mode == "tight":
        with pytest.raises(ValueError, match="not contiguous"):
            planned(new_stack(), mode)(**tensors)
        found = plan(mode)
        budget = found.problem.budget_bytes + tensors["z"].nbytes
        known = make_plan(new_stack(), tensors.values(), budget=budget, times="roofline")
        assert known.static["inputs"] == found.static["inputs"] + tensors["z"].nbytes
        apply_plan(new_stack(), known)(**tensors)
    else:
        planned(new_stack(), mode)(**tensors)


def test_a_fault_in_a_loop_is_named(mode: str) -> None:
    """A tensor of inference mode cannot be kept; plain torch refuses it too."""
    with torch.inference_mode():
        tensors = inputs()
    with pytest.raises(RuntimeError, match="inference"):
        step(planned(new_stack(), mode), tensors)
    assert issubclass(ChangedError, RuntimeError)


def test_replicas_and_sharded_parameters(mode: str) -> None:
    """DDP in its ways, accumulation with no_sync, FSDP2 on the root and per block; on two gloo processes."""
    if mode == "tight":  # the script takes both plans in turn
        done = launched(2, "-m", "tests.loops_on_ranks", seconds=600)
        assert done.code == 0, done.err[-3000:]
        assert done.out.count("all the same") == 2
