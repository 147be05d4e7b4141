"""Dynamic axial parallelism: on any number of ranks, under any schedule, what one process computes."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import group

from evoplan.cost_model import measure
from evoplan.cost_model.costs import build_cost_table
from evoplan.cost_model.devices import device
from evoplan.cost_model.fakes import fake_tensors
from evoplan.model import Chain, EvoformerConfig, EvoformerStack, InputShape, TrunkConfig
from evoplan.model.build import build_model
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.kinds import WHOLE
from evoplan.model.sharing.parallel import ParallelEvoformer
from evoplan.model.sharing.ranks import Ranks, lend
from evoplan.model.sharing.reshard import Reshard
from evoplan.planner.execution.apply import PlannedModule
from evoplan.planner.schedules.replay import replay
from evoplan.planner.schedules.schedule import Checkpoint, Run, Sequence
from tests.conftest import TINY, TINY_EXTRA, TINY_MSA_MODULE, TINY_PAIRFORMER, random_inputs, randomise
from tests.ranks import on_ranks
from tests.test_apply import random_schedule

S, R, S_EXTRA = 5, 7, 9  # 2 and 4 divide none of them
TRUNK = TrunkConfig(replace(TINY_EXTRA, n_block=1, c_m=6), replace(TINY, n_block=1))

# Model, number of a random schedule or None for none, batch (leading dimensions). The last ones go the way
# of other backends, by all-gather and reduce-scatter on padded shards.
CASES = [
    ("main", None, ()),
    ("main", None, (2,)),
    ("main", 0, ()),
    ("main", 1, ()),
    ("main", 2, (2,)),
    ("extra", None, ()),
    ("extra", 3, ()),
    ("trunk", None, ()),
    ("trunk", 4, (2,)),
    ("trunk", None, (), "nccl"),
    ("main", 5, (), "nccl"),
    ("pairformer", None, (2,)),
    ("pairformer", 6, ()),
    ("msa", None, ()),
    ("msa", 7, (2,)),
]
CONFIGS = {
    "main": TINY,
    "extra": TINY_EXTRA,
    "trunk": TRUNK,
    "pairformer": TINY_PAIRFORMER,
    "msa": replace(TINY_MSA_MODULE, last_m=True),
}


def shape_of(kind: str) -> InputShape:
    return InputShape(None if kind == "pairformer" else S, R, n_extra=S_EXTRA if kind == "trunk" else None)


def make(kind: str, batch: tuple[int, ...]) -> tuple[nn.Module, dict[str, Tensor]]:
    config = CONFIGS[kind]
    model = randomise(build_model(config).double()).train()
    inputs = random_inputs(TINY if kind == "trunk" else config, S, R, batch)
    if kind == "trunk":
        extra = random_inputs(TRUNK.extra, S_EXTRA, R, batch, seed=1)
        inputs |= {"e": extra["m"], "extra_mask": extra["msa_mask"]}
    return model, inputs


def weighted_loss(outputs: dict[str, Tensor], own=lambda name, weights: weights) -> Tensor:
    """A loss that tells every entry of the outputs apart; `own` cuts its weights as the outputs are cut."""
    shapes = {"m": (S, R, TINY.c_m), "z": (R, R, TINY.c_z), "s": (R, TINY_PAIRFORMER.c_s)}
    loss = torch.zeros((), dtype=torch.float64)
    for name, output in outputs.items():
        weights = torch.linspace(-1, 2, torch.Size(shapes[name]).numel(), dtype=output.dtype)
        loss = loss + (output * own(name, weights.view(shapes[name]))).square().sum()
    return loss


def gradients(model: nn.Module, inputs: dict[str, Tensor], own=lambda name, weights: weights):
    """The loss, and every gradient by name after what ranks do to share them."""
    stack = getattr(model, "stack", model)
    for parameter in stack.parameters():
        parameter.grad = None
    leaves = {n: t.detach().requires_grad_() if t.requires_grad else t for n, t in inputs.items()}
    outputs = model(**leaves)
    loss = weighted_loss(dict(zip(stack.outputs, outputs, strict=True)), own)
    loss.backward()
    parallel = stack if isinstance(stack, ParallelEvoformer) else model
    if isinstance(parallel, ParallelEvoformer):
        parallel.reduce_gradients()
        stack = parallel.stack
    grads = {n: t.grad for n, t in leaves.items() if t.requires_grad}
    return loss.detach(), grads | {n: p.grad.clone() for n, p in stack.named_parameters()}


def relative_error(expected: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """Largest difference of any tensor over that tensor's largest entry."""
    assert expected.keys() == got.keys()
    largest = max(float(t.abs().max()) for t in expected.values())
    return max(
        # Some gradients are zero by symmetry: rounding is measured against the others there.
        float((expected[n] - got[n]).abs().max() / max(float(expected[n].abs().max()), 1e-6 * largest))
        for n in expected
    )


def planned(model: ParallelEvoformer, number: int | None) -> nn.Module:
    if number is None:
        return model
    chain = Chain.of(model)
    return PlannedModule(model, random_schedule(chain, range(len(chain.steps)), random.Random(number), 3))


def compare(kind: str, number: int | None, batch: tuple[int, ...], backend: str = "gloo") -> dict[str, float]:
    """Errors of this rank against one process, for whole and for sharded outputs and for inference."""
    model, inputs = make(kind, batch)
    ranks = Ranks(group.WORLD)
    ranks.backend = backend
    torch.manual_seed(5)
    loss, expected = gradients(model, inputs)
    errors = {}
    for whole in (True, False):
        parallel = ParallelEvoformer(model, ranks, shape_of(kind), whole)

        def own(name: str, weights: Tensor, parallel=parallel) -> Tensor:
            return weights if parallel.whole else ranks.own(weights, parallel.output_cuts[name])

        given, wanted = dict(inputs), dict(expected)
        if not whole:
            for name, cut in parallel.input_cuts.items():
                given[name], wanted[name] = (ranks.own(x[name], cut) for x in (inputs, expected))
                assert given[name].shape[len(batch) :] == parallel.input_shapes[name][1:]
        torch.manual_seed(5 + ranks.rank)  # ranks follow the first one's dropout
        got_loss, got = gradients(planned(parallel, number), given, own)
        if not whole:
            ranks.sum_(got_loss)
        where = "whole" if whole else "sharded"
        errors[f"{where} loss"] = float((got_loss - loss).abs() / loss.abs())
        errors[f"{where} gradients"] = relative_error(wanted, got)
    with torch.no_grad():
        model.eval()
        outputs = planned(ParallelEvoformer(model, ranks, shape_of(kind)), number)(**inputs)
        wanted = model(**inputs)
        errors["inference"] = relative_error(dict(enumerate(wanted)), dict(enumerate(outputs)))
    return errors


def compare_without_reduction() -> float:
    """The error if backward of a gather only cut the gradient, as it must not."""
    model, inputs = make("main", ())
    _, expected = gradients(model.eval(), inputs)
    ranks = Ranks(group.WORLD)
    ranks.sum_own = ranks.own
    return relative_error(expected, gradients(ParallelEvoformer(model, ranks, shape_of("main")), inputs)[1])


def all_cases() -> tuple[list[dict[str, float]], float]:
    return [compare(*case) for case in CASES], compare_without_reduction()


@cache
def errors_on(size: int) -> list[tuple[list[dict[str, float]], float]]:
    return on_ranks(size, all_cases)


SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_ranks_compute_what_one_process_does(size: int, case: tuple) -> None:
    for rank, (errors, _) in enumerate(errors_on(size)):
        print(f"rank {rank} of {size}: {errors[CASES.index(case)]}")
        for what, error in errors[CASES.index(case)].items():
            assert error < 1e-9, f"{what} on rank {rank} of {size}"


@pytest.mark.parametrize("size", SIZES)
def test_a_gather_without_reduction_is_wrong(size: int) -> None:
    assert all(error > 1e-3 for _, error in errors_on(size))


def imagined(kind: str = "main", size: int = 2, rank: int = 0) -> ParallelEvoformer:
    model, _ = make(kind, ())
    return ParallelEvoformer(model, Ranks(None, rank, size), shape_of(kind))


def test_reshards_are_as_few_as_can_be() -> None:
    """In a block m goes to columns and back, z to columns and back twice; the last block stays as it ends."""
    steps = Chain.of(imagined()).steps
    moved = [[s.target for s in steps if s.group == g and isinstance(s.submodule, Reshard)] for g in (0, 1)]
    assert moved == [["m", "z", "z", "z"], ["m", "z", "m", "z", "z", "z"]]
    assert imagined().output_cuts == {"m": -2, "z": -2}


def test_parameters_are_the_stacks_own() -> None:
    parallel = imagined("trunk")
    own = {id(p) for p in parallel.stack.parameters()}
    assert {id(p) for step in Chain.of(parallel).steps for p in step.submodule.parameters()} == own
    assert {name.removeprefix("stack.") for name in parallel.state_dict()} == set(parallel.stack.state_dict())


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="m has an axis of 5, which 6 ranks cannot share"):
        imagined(size=6)
    with pytest.raises(ValueError, match=r"built for m of shape \(1, 5, 7, 12\), not \(6, 7, 12\)"):
        imagined()(**random_inputs(TINY, s=6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_gloo_is_lent_is_the_tensors_own_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(6, dtype=dtype)
    lent = lend(tensor)
    lent[2] = -1
    assert lent.dtype == dtype
    assert tensor.tolist() == lent.tolist() == [0, 1, -1, 3, 4, 5]
    del lent  # frees nothing
    assert tensor[2] == -1
    none = tensor[:0]
    assert lend(none) is none
    with fake_tensors():
        fake = torch.empty(3)
        assert lend(fake) is fake


MEASURED, MEASURED_SHAPE = EvoformerConfig(n_block=2, c_m=64, c_z=64), InputShape(32, 64)


def two_schedules(model: ParallelEvoformer) -> list[Sequence]:
    """Everything kept, and a checkpoint around each block."""
    chain = Chain.of(model)
    runs = [Run(step.index, WHOLE) for step in chain.steps]
    blocks = (Sequence(tuple(runs[g.start : g.stop])) for g in chain.groups)
    return [
        Sequence(tuple(runs)),
        Sequence(tuple(Checkpoint(b, (WHOLE,) * len(b.span)) for b in blocks)),
    ]


def measured_peaks() -> list[int]:
    """Of each schedule on this rank, from the allocator."""
    model = randomise(EvoformerStack(MEASURED)).train()
    parallel = ParallelEvoformer(model, Ranks(group.WORLD), MEASURED_SHAPE, whole=False)
    whole = random_inputs(MEASURED, 32, 64, (1,), torch.float32)
    state = {name: parallel.ranks.own(whole[name].detach(), cut) for name, cut in parallel.input_cuts.items()}
    masks = {name: mask for name, mask in whole.items() if name not in state}
    for parameter in parallel.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(schedule: Sequence) -> None:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in state.items()}
        m, z = PlannedModule(parallel, schedule)(**leaves, **masks, dropout_seed=0)
        mean_square(m, z).backward()

    schedules = two_schedules(parallel)
    step(schedules[0])
    return [measure.peak_bytes(lambda s=schedule: step(s)) for schedule in schedules]


@pytest.mark.slow
def test_the_peak_of_a_rank_is_predicted() -> None:
    masks = {"msa_mask": (1, 32, 64), "pair_mask": (1, 64, 64)}
    peaks = {}
    for size in (1, 2):
        ranks = Ranks(None, 0, size, "gloo")
        shared = ParallelEvoformer(EvoformerStack(MEASURED), ranks, MEASURED_SHAPE, whole=False)
        shapes = shared.input_shapes | masks
        table = build_cost_table(shared, shapes, "float32", device("cpu"))
        made = table.input_bytes - 4 * sum(map(prod, shapes.values()))  # this rank's cuts of the masks
        peaks[size] = [made + replay(schedule, table).peak_bytes for schedule in two_schedules(shared)]
    for measured in on_ranks(2, measured_peaks):
        print(measured, peaks)
        for got, predicted, alone in zip(measured, peaks[2], peaks[1], strict=True):
            assert got == pytest.approx(predicted, rel=1e-3)
            assert got < 0.6 * alone
