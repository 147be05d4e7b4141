"""Random problems for `fuzz`: every case is drawn from (seed, index) alone.

Cases come in families: those of one family share all that costs are traced from, and differ in the rest.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from evoplan.cost_model.steps import offered_strategies
from evoplan.experiments.fuzz_tensors import laid, mask
from evoplan.model.build import build_model
from evoplan.model.config import InputShape, ModelConfig
from evoplan.model.families import (
    EvoformerConfig,
    MSAModuleConfig,
    PairformerConfig,
    TinyOpenFoldConfig,
    TrunkConfig,
)
from evoplan.model.families.evoformer import ColumnAttention
from evoplan.model.running.chain import Chain, Plannable
from evoplan.model.running.kernels import kernels_for
from evoplan.model.running.kinds import WHOLE
from evoplan.model.running.strategy import Strategy
from evoplan.planner.checking.trial import random_stack
from evoplan.planner.problems.costing import kind_of
from evoplan.planner.problems.problem import AUTOCAST, Given, Problem

FAMILY = 16  # cases that share one trace
FULL_OFFER = 0.04  # of all families, those whose plans choose among all strategies there are
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17, 20)
KINDS = ("main", "main", "extra", "trunk", "tiny", "pairformer", "msa")
PRECISIONS = ("float64", "float64", "float32", "float32", "bfloat16", "float16", "bf16-mixed", "fp16-mixed")
LAYOUTS = ("plain", "plain", "plain", "transposed", "channels first", "slice", "expanded")
MASK_DTYPES = (None, None, "bool", "int64", "float32", "bfloat16")  # None: the state's
CONTENTS = ("random", "random", "rows", "columns", "none of it", "all of it")
BUDGETS = ("least", "least", "between", "between", "between", "unlimited peak", "beyond", "none")
TRAINED = ("all", "all", "all", "submodule frozen", "block frozen", "biases", "one frozen", "one", "none")


@dataclass(frozen=True)
class Trained:
    """Which parameters are trained; `number` says which submodule, block or parameter is meant."""

    which: str
    number: int

    def apply(self, stack: Plannable) -> Plannable:
        """Freeze the others."""
        names = [name for name, _ in stack.named_parameters()]
        chosen = names[self.number % len(names)]
        of_block, _, rest = chosen.partition("blocks.")
        block = f"{of_block}blocks.{rest.partition('.')[0]}."
        submodule = "." + rest.split(".")[1] + "."
        for name, parameter in stack.named_parameters():
            frozen = {
                "all": False,
                "submodule frozen": submodule in name,
                "block frozen": name.startswith(block),
                "biases": not name.endswith("bias"),
                "one frozen": name == chosen,
                "one": name != chosen,
                "none": True,
            }[self.which]
            if frozen:
                parameter.requires_grad_(False)
        return stack


@dataclass(frozen=True)
class Family:
    """What a plan depends on besides the budget.

    Attributes:
        layouts: how inputs lie in memory; of those masks that are given, too.
        mask_dtypes: of the masks that are given.
        own_loss: the plan is made for a loss of the user's own.
        offer: strategies that each step may run under; None: all.
    """

    number: int
    problem: Problem
    trained: Trained
    layouts: Mapping[str, str]
    mask_dtypes: Mapping[str, str]
    own_loss: bool
    offer: dict[int, set[Strategy]] | None

    def stack(self) -> Plannable:
        """The model without data."""
        with torch.device("meta"):
            stack = build_model(self.problem.config).train(self.problem.training)
        return self.trained.apply(stack)

    def in_order(self, inputs: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Inputs as forward takes them; None: not given."""
        names = [*self.problem.state_shapes(), *self.problem.mask_shapes()]
        return [inputs.get(name) for name in names]


@dataclass(frozen=True)
class Case:
    """A problem, its inputs and its budget.

    Attributes:
        differentiated: inputs that get a gradient.
        outputs: what forward returns.
        reach: those that the loss depends on.
        contents: what is missing in each mask.
        budget: a kind of budget; `share` of the way from the least to the unlimited plan's peak.
    """

    seed: int
    index: int
    family: Family
    differentiated: tuple[str, ...]
    outputs: tuple[str, ...]
    reach: tuple[str, ...]
    contents: Mapping[str, str]
    budget: str
    share: float

    def model(self) -> Plannable:
        """The model, with weights of its own."""
        return self.family.trained.apply(random_stack(self.family.problem, "cpu"))

    def inputs(self) -> dict[str, Tensor]:
        """Forward's arguments by name."""
        problem, layouts = self.family.problem, self.family.layouts
        torch.manual_seed((self.seed * 1_000_003 + self.index) % 2**63)
        state = {
            name: laid(torch.randn(shape, dtype=getattr(torch, problem.dtype)), layouts[name])
            for name, shape in problem.state_shapes().items()
        }
        for name in self.differentiated:
            state[name].requires_grad_()
        shapes = problem.mask_shapes()
        masks = {
            name: laid(mask(shapes[name], self.contents[name]).to(getattr(torch, dtype)), layouts[name])
            for name, dtype in self.family.mask_dtypes.items()
        }
        return state | masks

    def __str__(self) -> str:
        problem = self.family.problem
        given = {name: layout for name, layout in self.family.layouts.items() if layout != "plain"}
        masks = {name: (self.contents[name], dtype) for name, dtype in self.family.mask_dtypes.items()}
        return (
            f"{problem.config}, {problem.shape}, {problem.precision}, {problem.mode}"
            f"{' of donated inputs' * problem.donate}, {problem.optimizer}, "
            f"trained: {self.family.trained.which} ({self.family.trained.number}), layouts {given}, masks "
            f"{masks}, gradients of {self.differentiated}, loss of {self.reach}, budget {self.budget} "
            f"({self.share:.3f}), {'own loss' if self.family.own_loss else 'mean square'}, "
            f"{'a few' if self.family.offer else 'all'} strategies"
        )


@lru_cache(maxsize=4)
def draw_family(seed: int, number: int) -> Family:
    """A family by its number."""
    rng = random.Random(f"family {seed} {number}")
    precision = rng.choice(PRECISIONS)
    kind = rng.choice(KINDS)
    config = _config(rng, kind)
    n_seq, n_res, batch = rng.choice(SIZES), rng.choice(SIZES), rng.choice((1, 1, 1, 2, 3))
    n_extra = rng.choice(SIZES) if kind == "trunk" else None
    shape = InputShape(None if kind == "pairformer" else n_seq, n_res, batch, n_extra)
    mixed = next((name for name in AUTOCAST if name == precision), None)
    problem = Problem(
        model="custom", config=config, shape=shape,
        dtype="float32" if mixed else precision, mixed=mixed,
        mode=rng.choice(("training", "training", "training", "inference")),
        optimizer=rng.choice(("none", "sgd", "adamw")),
    )  # fmt: skip
    own_loss = problem.training and rng.random() < 0.2
    if own_loss:
        problem = problem.model_copy(update={"loss": squares.__qualname__})
    masks = [name for name in config.masks if rng.random() < 0.75]
    layouts = {name: rng.choice(LAYOUTS) for name in problem.state_shapes()}
    if not problem.training and random.Random(f"donated {seed} {number}").random() < 0.5:
        problem = problem.model_copy(update={"donate": True})
        layouts = dict.fromkeys(layouts, "plain")  # others would be copied
    layouts |= {name: rng.choice([at for at in LAYOUTS if at != "channels first"]) for name in masks}
    mask_dtypes = {name: rng.choice(MASK_DTYPES) or problem.dtype for name in masks}
    trained = Trained(rng.choice(TRAINED), rng.randrange(10**6))
    full = rng.random() < FULL_OFFER
    family = Family(number, problem, trained, layouts, mask_dtypes, own_loss, None)
    family = replace(family, problem=problem.model_copy(update={"given": _given(family)}))
    return family if full else replace(family, offer=_offer(rng, family))


def draw_case(seed: int, index: int) -> Case:
    """A case by its index."""
    rng = random.Random(f"case {seed} {index}")
    family = draw_family(seed, index // FAMILY)
    problem = family.problem
    state = tuple(problem.state_shapes()) if problem.training else ()
    differentiated = tuple(name for name in state if rng.random() < 0.7)
    if family.trained.which == "none" and not differentiated:
        differentiated = state[-1:]
    outputs = family.stack().outputs
    reach = outputs if family.own_loss or rng.random() < 0.5 else (rng.choice(outputs),)
    contents = {name: rng.choice(CONTENTS) for name in family.mask_dtypes}
    return Case(
        seed, index, family, differentiated, outputs, reach, contents, rng.choice(BUDGETS), rng.random() ** 2
    )


def _config(rng: random.Random, kind: str) -> ModelConfig:
    # At least two channels wherever a layer norm reads them: one alone has no gradient, and what is computed
    # for it is rounding, 300 times enlarged.
    blocks = rng.choice((1, 1, 2))
    if kind == "tiny":
        heads, pair_heads = rng.randint(1, 3), rng.randint(1, 3)
        return TinyOpenFoldConfig(
            n_block=blocks, c_m=heads * rng.randint(2, 5), c_z=pair_heads * rng.randint(2, 5),
            n_head_msa=heads, n_head_pair=pair_heads,
            c_opm=rng.randint(1, 5), transition_factor=rng.randint(1, 4),
        )  # fmt: skip

    if kind in ("pairformer", "msa"):
        widths = {
            "n_block": blocks, "c_z": rng.randint(2, 13), "n_head_pair": rng.randint(1, 4),
            "c_head": rng.randint(1, 7), "c_tri": rng.randint(2, 9), "transition_factor": rng.randint(1, 4),
        }  # fmt: skip
        dropout = rng.choice((0.0, 0.3))
        c, heads, c_head = rng.randint(2, 15), rng.randint(1, 4), rng.randint(1, 7)
        if kind == "pairformer":
            return PairformerConfig(
                c_s=c, n_head_single=heads, c_head_single=c_head, dropout_pair=dropout, **widths
            )
        return MSAModuleConfig(
            c_m=c, n_head_msa=heads, c_head_msa=c_head, c_opm=rng.randint(1, 6), last_m=rng.random() < 0.5,
            dropout_msa=rng.choice((0.0, 0.3)), dropout_pair=dropout, **widths,
        )  # fmt: skip

    def stack(columns: ColumnAttention, c_z: int) -> EvoformerConfig:
        return EvoformerConfig(
            n_block=blocks if kind != "trunk" else 1, c_m=rng.randint(2, 15), c_z=c_z,
            n_head_msa=rng.randint(1, 4), n_head_pair=rng.randint(1, 4),
            c_head=rng.randint(1, 7), c_head_msa=rng.randint(1, 7), c_opm=rng.randint(1, 6),
            c_tri=rng.randint(2, 9), transition_factor=rng.randint(1, 4), column_attention=columns,
            dropout_msa=rng.choice((0.0, 0.3)), dropout_pair=rng.choice((0.0, 0.3)),
        )  # fmt: skip

    c_z = rng.randint(2, 13)
    if kind == "trunk":
        return TrunkConfig(stack("global", c_z), stack("gated", c_z))
    return stack("global" if kind == "extra" else "gated", c_z)


def _given(family: Family) -> tuple[Given, ...]:
    """How inputs are given that are not as the model wants them."""
    problem, found = family.problem, []
    shapes = problem.state_shapes() | problem.mask_shapes()
    for name, layout in family.layouts.items():
        tensor = laid(torch.empty(shapes[name]), layout)
        stride = None if tensor.is_contiguous() else tensor.stride()
        dtype = family.mask_dtypes.get(name, problem.dtype)
        if stride is not None or dtype != problem.dtype:
            found.append(Given(name=name, dtype=None if dtype == problem.dtype else dtype, stride=stride))
    return tuple(found)


def _offer(rng: random.Random, family: Family) -> dict[int, set[Strategy]]:
    """`whole` and two more strategies for each step, the same for steps of a kind."""
    chosen: dict[str, list[Strategy]] = {}
    steps = Chain.of(family.stack()).steps
    for step in steps:
        shape = family.problem.state_shapes()[step.target]
        offered = offered_strategies(step, shape, kernels_for("cpu"))
        others = [s for s in offered if s != WHOLE and (family.problem.training or s.way.pays_in_inference)]
        chosen.setdefault(kind_of(step.name), rng.sample(others, min(2, len(others))))
    ways = [chosen[kind_of(step.name)] or [WHOLE] for step in steps]
    return {step.index: {WHOLE, way[0], way[-1]} for step, way in zip(steps, ways, strict=True)}


def squares(results: tuple[Tensor, ...]) -> Tensor:
    """A loss as users write them, with temporaries of the size of what it reads."""
    total = sum((x * x).mean() for x in results)
    assert isinstance(total, Tensor)  # there is a result
    return total
