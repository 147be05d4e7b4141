"""What people change between forward and backward or hang on a model: as without a plan, or refused."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from evoplan.model.running.chain import Chain
from evoplan.model.running.strategy import Strategy
from evoplan.model.running.unchanged import ChangedError
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.schedules.schedule import Run, Sequence
from tests.conftest import random_schedule_of
from tests.loops import MODES, assert_same, gradients, inputs, loss_of, new_stack, plan, planned, step

pytestmark = pytest.mark.parametrize("mode", MODES)


def write(what: str, stack: nn.Module, given: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> None:
    """Write in place where backward will read."""
    m, z = outputs
    with torch.no_grad():
        match what:
            case "input m":
                given["m"].zero_()
            case "input z":
                given["z"].mul_(2.0)
            case "mask":
                given["msa_mask"].zero_()
            case "output m":
                m.clamp_(-0.1, 0.1)
            case "a slice of m":
                m[:, 0] += 1.0
            case "output z":
                z.mul_(2.0)
            case "a weight":
                stack.blocks[0].msa_transition.linear_2.weight.mul_(1.5)
            case "all weights":
                for parameter in stack.parameters():
                    parameter.mul_(0.9)
            case "other data":
                weight = stack.blocks[1].pair_transition.linear_1.weight
                weight.data = weight.data * 2


# What is named in the message, and which plans need it; another may go on with what it has.
WRITES = {
    "input m": ("m of blocks.0.row_attention", MODES),
    "input z": ("z of blocks.0", MODES),
    "mask": ("msa_mask of blocks", MODES),
    "output m": ("m of blocks.1.outer_product_mean", MODES),
    "a slice of m": ("m of blocks.1.outer_product_mean", MODES),
    "a weight": ("linear_2.weight of blocks.0.msa_transition", MODES),
    "all weights": ("weight of blocks.1", MODES),
    "other data": ("linear_1.weight of blocks.1.pair_transition", ("tight",)),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_tensor_that_is_written_into_is_named(mode: str, what: str) -> None:
    """Never a gradient of something else: refused where it is needed, the plain gradient where it is not."""
    named, needed = WRITES[what]
    stack, given = new_stack(), inputs()
    outputs = planned(stack, mode)(**given, dropout_seed=7)
    loss = loss_of(tuple(x.clone() for x in outputs))
    write(what, stack, given, outputs)
    if mode in needed:
        with pytest.raises(ChangedError, match=named.replace(".", r"\.")):
            loss.backward()
    else:
        loss.backward()
        plain, given = new_stack(), inputs()
        outputs = plain(**given, dropout_seed=7)
        loss = loss_of(tuple(x.clone() for x in outputs))
        write(what, plain, given, outputs)
        loss.backward()
        assert_same(gradients(plain), gradients(stack))


def test_an_output_that_nobody_needs_may_be_written_into(mode: str) -> None:
    def loop(model: nn.Module) -> dict[str, Tensor | None]:
        m, z = model(**inputs(), dropout_seed=7)
        loss_of((m, torch.relu_(z))).backward()
        return gradients(model)

    assert_same(loop(new_stack()), loop(planned(new_stack(), mode)))


def test_every_schedule_notices(mode: str) -> None:
    """Any schedule of any depth: an input is zeroed, or all weights are scaled."""
    for seed in range(6 if mode == "tight" else 0):
        for what in ("input m", "all weights"):
            stack, given = new_stack(), inputs()
            outputs = PlannedModule(stack, random_schedule_of(stack, seed))(**given, dropout_seed=7)
            write(what, stack, given, outputs)
            with pytest.raises(RuntimeError, match=r"changed in place|inplace operation"):
                loss_of(outputs).backward()


# --- parameters and modules ------------------------------------------------------------------


def test_parameters_are_those_of_this_forward(mode: str) -> None:
    stack, other = new_stack(), new_stack(seed=3)
    model = planned(stack, mode)
    step(model, inputs())
    stack.load_state_dict({name: t.clone() for name, t in other.state_dict().items()}, assign=True)
    step(model, inputs())
    step(other, inputs())
    assert_same(gradients(other), gradients(model))


def test_parameters_of_forward_are_those_of_its_backward(mode: str) -> None:
    """Others come in between; some are frozen in between."""
    stack, plain = new_stack(), new_stack()
    mine = dict(stack.named_parameters())
    loss = loss_of(planned(stack, mode)(**inputs(), dropout_seed=7))
    other = {name: t.clone() for name, t in new_stack(seed=3).state_dict().items()}
    stack.load_state_dict(other, assign=True)
    for name in list(mine)[::2]:
        mine[name].requires_grad_(False)
    got = torch.autograd.grad(loss, [p for p in mine.values() if p.requires_grad])
    step(plain, inputs())
    names = [name for name, p in mine.items() if p.requires_grad]
    assert_same({name: plain.get_parameter(name).grad for name in names}, dict(zip(names, got, strict=True)))
    for name, tensor in other.items():
        assert torch.equal(stack.state_dict()[name], tensor)  # and are there again


def test_functional_call(mode: str) -> None:
    def of(model: nn.Module) -> dict[str, Tensor]:
        new = {n: (2 * t).requires_grad_() for n, t in new_stack(seed=5).state_dict().items()}
        outputs = torch.func.functional_call(model, new, (), inputs() | {"dropout_seed": 7})
        return dict(zip(new, torch.autograd.grad(loss_of(outputs), list(new.values())), strict=True))

    assert_same(of(new_stack()), of(planned(new_stack(), mode)))


def test_a_block_is_replaced(mode: str) -> None:
    stack, plain = new_stack(), new_stack()
    model = planned(stack, mode)
    step(model, inputs())
    stack.blocks[1], plain.blocks[1] = (new_stack(seed=8).blocks[0] for _ in range(2))
    model.zero_grad()
    step(model, inputs())
    step(plain, inputs())
    assert_same(gradients(plain), gradients(model))


# --- hooks, adapters ---------------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank adapter in place of a layer, which keeps `.weight` in reach as many do."""

    def __init__(self, base: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        g = torch.Generator().manual_seed(base.in_features)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=g).to(base.weight))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, generator=g).to(base.weight))
        self.dropout = nn.Dropout(dropout)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.3 * self.dropout(x) @ self.a.T @ self.b.T


def adapted(dropout: float = 0.0) -> nn.Module:
    """The stack with an adapter in place of every linear layer."""
    stack = new_stack()
    for name, layer in list(stack.named_modules()):
        if isinstance(layer, nn.Linear):
            owner, _, last = name.rpartition(".")
            setattr(stack.get_submodule(owner), last, Adapter(layer, dropout))
    return stack


def apply_as_is(stack: nn.Module, mode: str) -> PlannedModule:
    """Under the plan of the plain model, whose co-shards become chunks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return planned(stack, mode)


@pytest.mark.filterwarnings("ignore:.*runs as chunk:UserWarning")
def test_adapters_on_every_linear_layer(mode: str) -> None:
    plain, model = adapted(), apply_as_is(adapted(), mode)
    step(plain, inputs())
    step(model, inputs())
    assert sum(p.grad is not None for p in model.parameters()) > 100
    assert_same(gradients(plain), gradients(model), 1e-10)


def test_a_plan_says_that_it_does_not_know_adapters(mode: str) -> None:
    with pytest.warns(UserWarning, match="does not know blocks.0.row_attention.linear_b and"):
        planned(adapted(), mode)


def test_adapters_that_drop(mode: str) -> None:
    """Whole and lean runs draw again what forward drew; pieces cannot, and say so."""
    stack = adapted(dropout=0.5)
    schedule = random_schedule_of(stack, 2, whole=mode == "roomy")
    model, plain = PlannedModule(stack, schedule), adapted(dropout=0.5)
    torch.manual_seed(3)
    if mode == "tight":
        with pytest.raises(ValueError, match=r"draws random numbers.*runs it whole"):
            step(model, inputs())
        return
    step(model, inputs())
    torch.manual_seed(3)
    step(plain, inputs())
    assert_same(gradients(plain), gradients(model), 1e-10)


@pytest.mark.filterwarnings("ignore:.*runs as chunk:UserWarning")
def test_a_layer_that_changes_at_every_forward(mode: str) -> None:
    """A spectral norm iterates in forward: kept steps go on as ever, steps that run again say so."""

    def make() -> nn.Module:
        stack = new_stack()
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(stack.blocks[0].msa_transition.linear_1)
        return stack

    plain, model = make(), apply_as_is(make(), mode)
    if mode == "tight":
        with pytest.raises(ValueError, match=r"_u of blocks.0.msa_transition changes with every forward"):
            step(model, inputs())
        return
    step(plain, inputs())
    step(model, inputs())
    assert_same(gradients(plain), gradients(model))


@pytest.mark.filterwarnings("ignore:.*runs as chunk:UserWarning")
def test_hooks_see_every_module(mode: str) -> None:
    calls: dict[str, Counter[str]] = {}
    for kind in ("plain", "planned"):
        stack, seen = new_stack(), Counter()

        def count(module, *rest, name=None, seen=seen) -> None:
            seen[name] += 1

        def hook(name: str, count=count):
            return lambda *arguments: count(*arguments, name=name)

        for name, module in stack.named_modules():
            module.register_forward_hook(hook(f"{name} forward"))
            module.register_forward_pre_hook(hook(f"{name} before"))
            if not name.count(".") > 2:
                module.register_full_backward_hook(hook(f"{name} backward"))
        step(stack if kind == "plain" else apply_as_is(stack, mode), inputs())
        calls[kind] = seen
    assert calls["plain"].keys() == calls["planned"].keys()
    for name in ("blocks.1 forward", "blocks.0.row_attention backward", "blocks.1 backward", " forward"):
        assert calls["planned"][name] >= calls["plain"][name] == 1
    for name in ("blocks.0.row_attention backward", "blocks.1 backward"):
        assert calls["planned"][name] == 1  # gradients come by once, however often a forward runs


@pytest.mark.filterwarnings("ignore:.*runs as chunk:UserWarning")
@pytest.mark.parametrize(
    "where", ["blocks.0.msa_transition", "blocks.1.triangle_starting.attention.linear_v"]
)
def test_hooks_that_change_something(mode: str, where: str) -> None:
    """A submodule's or a layer's result is replaced: with the gradient of that."""

    def make() -> nn.Module:
        stack = new_stack()
        stack.get_submodule(where).register_forward_hook(lambda module, given, out: out * 1.5)
        return stack

    plain, model = make(), apply_as_is(make(), mode)
    step(plain, inputs())
    step(model, inputs())
    assert_same(gradients(plain), gradients(model), 1e-10)


def test_a_hook_that_gives_a_block_other_tensors_is_refused(mode: str) -> None:
    stack = new_stack()
    stack.blocks[1].register_forward_pre_hook(lambda module, given: tuple(2 * x for x in given))
    with pytest.raises(ValueError, match="a hook on a block"):
        planned(stack, mode)(**inputs())


def test_what_a_hook_keeps_in_inference_is_left_alone(mode: str) -> None:
    stack, kept = new_stack().eval(), {}
    for name, submodule in stack.blocks[0].submodules():
        submodule.register_forward_hook(lambda module, given, out, name=name: kept.update({name: out}))
    with torch.no_grad():
        stack(**inputs())
        expected = {name: out.clone() for name, out in kept.items()}
        # In pieces, which write over what the chain made: a plan for training discards whole.
        steps = Chain.of(stack).steps
        runs = tuple(Run(s.index, Strategy("chunk", s.submodule.axes[0].name, 2)) for s in steps)
        for model in (planned(stack, mode), PlannedModule(stack, Sequence(runs))):
            kept.clear()
            model(**inputs())
            assert kept.keys() == expected.keys()
            for name, out in expected.items():
                torch.testing.assert_close(kept[name], out, rtol=0, atol=1e-11)


def test_compiled_blocks_and_models_around(mode: str) -> None:
    """A compiled model breaks its graph at the planned one, and trains as it would."""

    class Around(nn.Module):
        def __init__(self, stack: nn.Module) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            m, z = self.stack(given["m"] * 2, given["z"] + 1, dropout_seed=7)
            return loss_of((m * 0.5, z))

    plain = Around(new_stack())
    plain(inputs()).backward()
    torch._dynamo.reset()
    model = planned(new_stack(), mode)
    counters["graph_break"].clear()
    compiled = torch.compile(Around(model), backend="aot_eager")
    compiled(inputs()).backward()
    assert sum(counters["graph_break"].values()) == 1, counters["graph_break"]
    assert_same(gradients(plain.stack), gradients(model))
    assert plan(mode).problem.loss == "mean_square"
