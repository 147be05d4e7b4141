"""Who holds which version: worked out by hand, and a state tensor that dies in the middle of a chain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evoplan.cost_model.costs import build_cost_table
from evoplan.cost_model.devices import device
from evoplan.cost_model.fakes import fake_copy, fake_tensors
from evoplan.cost_model.liveness import INPUT, Liveness, Version
from evoplan.cost_model.meta_calls import MetaCalls
from evoplan.cost_model.trace import Trace
from evoplan.model import Chain, EvoformerStack, EvoformerTrunk, InputShape, TrunkConfig
from evoplan.model.modules.representations import ALPHAFOLD
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.submodule import Submodule
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import depth
from evoplan.planner.solvers import Frontier
from tests.conftest import TINY, TINY_EXTRA, random_inputs, randomise

CALLS = MetaCalls()

# e is rewritten from z and read by z's step; then z and m go on, and nobody reads e again.
READS = [("e", "z"), ("z", "e"), ("m", "z"), ("z", "m")]


def test_a_small_chain_by_hand() -> None:
    liveness = Liveness(READS, outputs=("m", "z"))
    e, m, z = (Version(name, INPUT) for name in "emz")
    assert set(liveness.alive(0)) == {e, m, z}
    assert set(liveness.alive(1)) == {Version("e", 0), m, z}
    assert set(liveness.alive(2)) == {m, Version("z", 1)}  # e after step 0 was read for the last time
    assert set(liveness.outputs) == {Version("m", 2), Version("z", 3)}
    assert liveness.last_reads(1) == ("e",)
    assert liveness.last_reads(0) == ()  # e's first version is replaced, which is not the end of e
    assert set(liveness.entry(range(1, 4))) == {Version("e", 0), z, m}
    assert set(liveness.made(0, 2)) == {Version("z", 1)}
    assert set(liveness.made(0, 4)) == {Version("m", 2), Version("z", 3)}


def test_a_step_that_makes_several_tensors() -> None:
    """m and z from both; then z alone, beside something new; then an output from what is new."""
    reads, makes = [("m", "z"), ("z",), ("e", "m")], [("m", "z"), ("z", "e"), ("m",)]
    liveness = Liveness(reads, ("m",), makes)
    assert liveness.made_by(1) == (Version("z", 1), Version("e", 1))
    assert set(liveness.alive(1)) == {Version("m", 0), Version("z", 0)}  # e is made anew
    assert set(liveness.alive(2)) == {Version("m", 0), Version("e", 1)}
    assert liveness.last_reads(1) == ("z",)  # made, and read by nobody
    assert liveness.last_reads(2) == ("e",)
    assert liveness.entry(range(1, 3)) == (Version("z", 0), Version("m", 0))
    assert set(liveness.made(0, 1)) == {Version("m", 0), Version("z", 0)}


def test_a_version_that_nobody_reads() -> None:
    liveness = Liveness([("z",), ("e", "z")], outputs=("z",))
    assert liveness.last_reads(1) == ("e",)
    assert liveness.alive(2) == (Version("z", 0),)


def simulated_peak(model: torch.nn.Module, schedule, shapes) -> int:
    """The schedule run on fake tensors: its peak above parameters, gradients and inputs."""
    with fake_tensors(), Trace(1, call=CALLS) as trace:
        model = fake_copy(model, torch.float64)
        inputs = {name: torch.empty(s, dtype=torch.float64, requires_grad=True) for name, s in shapes.items()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        planned, (_, constants) = PlannedModule(model, schedule), model.prepare(**inputs)
        planned.stack.prepare = lambda **tensors: (dict(tensors), constants)
        before = trace.live_bytes
        trace.reset()
        outputs = planned(**inputs, dropout_seed=0)  # held by the caller, as in training
        mean_square(*outputs).backward()
        return trace.peak_bytes - before


def check_plans(model: torch.nn.Module, shapes, inputs, deepest: int) -> None:
    """Several budgets: the replay's peak is the simulated one, and gradients are the model's own."""
    with torch.device("meta"):
        empty = type(model)(model.config).train()
    table = build_cost_table(empty, shapes, "float64", replace(device("a100-40gb"), block_bytes=1))
    frontier = Frontier(table)
    depths = set()
    for budget in frontier.budgets(3):
        schedule = frontier.schedule(budget)
        depths.add(depth(schedule))
        predicted = replay(schedule, table).peak_bytes
        assert simulated_peak(empty, schedule, shapes) == pytest.approx(predicted, abs=600)
        leaves = [inputs[name] for name in shapes] + list(model.parameters())

        def gradients(run, leaves=leaves):
            loss = mean_square(*run(**inputs, dropout_seed=3))
            return loss, torch.autograd.grad(loss, leaves)

        (loss, expected), (planned_loss, got) = gradients(model), gradients(PlannedModule(model, schedule))
        torch.testing.assert_close(planned_loss, loss, rtol=1e-12, atol=0)
        largest = max(float(g.abs().max()) for g in expected)
        for a, b in zip(expected, got, strict=True):
            assert float((a - b).abs().max()) <= 1e-11 * largest
    assert max(depths) >= deepest


@pytest.mark.slow
def test_a_trunk_is_planned_exactly() -> None:
    config = TrunkConfig(replace(TINY_EXTRA, c_m=8, n_block=1), TINY)
    model = randomise(EvoformerTrunk(config).double()).train()
    shapes = config.state_shapes(InputShape(5, 7, n_extra=11))
    inputs = random_inputs(TINY, batch=(1,))
    inputs["e"] = torch.randn(shapes["e"], dtype=torch.float64).requires_grad_()
    inputs["extra_mask"] = (torch.rand(shapes["e"][:-1]) > 0.2).double()
    check_plans(model, shapes, inputs, deepest=2)


class Uncut(Submodule):
    """A submodule of somebody else's that cannot be cut: z plus the norm of m's mean row."""

    layout = ALPHAFOLD
    target = "z"
    piece_inputs = ("m",)

    def __init__(self, config) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleDict({"m": torch.nn.LayerNorm(config.c_m)})
        self.linear = torch.nn.Linear(config.c_m, config.c_z)
        self.axes = ()

    def piece(self, m, context=None, part=None):
        row = self.linear(m.mean(dim=-3))
        return row.unsqueeze(-2) * row.unsqueeze(-3)

    def finish(self, update):
        return update


class Mixed(EvoformerStack):
    """Blocks that differ: in width of the transition, and one with a submodule that cannot be cut."""

    def __init__(self, config) -> None:
        super().__init__(config)
        wide = EvoformerStack(replace(config, n_block=1, transition_factor=3, n_head_msa=1)).blocks[0]
        wide.uncut = Uncut(config)
        self.blocks.insert(1, wide)


def test_a_chain_of_unlike_blocks_is_planned_exactly() -> None:
    config = replace(TINY, n_block=2, dropout_msa=0.0)
    model = randomise(Mixed(config).double()).train()
    assert [len(group) for group in Chain.of(model).groups] == [9, 10, 9]
    shapes = config.state_shapes(InputShape(5, 7))
    check_plans(model, shapes, random_inputs(config, batch=(1,)), deepest=2)
