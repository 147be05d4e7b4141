"""What users call with something that is none: one line that says what to give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import evoplan

CONFIG = evoplan.EvoformerConfig(n_block=1, c_m=8, c_z=8, n_head_msa=2, n_head_pair=2, c_head=4, c_tri=8)
M, Z = torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 3, 8)


@pytest.fixture(scope="module")
def stack() -> evoplan.EvoformerStack:
    return evoplan.EvoformerStack(CONFIG)


@pytest.fixture(scope="module")
def plan(stack: evoplan.EvoformerStack) -> evoplan.Plan:
    return evoplan.make_plan(stack, (M, Z))


def refused(says: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("mode is 'train'; choose training or inference", {"mode": "train"}),
        ("optimizer is 'adam'; choose none or sgd or adamw", {"optimizer": "adam"}),
        ("times is 'x'; choose auto or measured", {"times": "x"}),
        ("ranks: Input should be greater than or equal to 1", {"ranks": 0}),
        ("ranks: Input should be a valid integer", {"ranks": "many"}),
        ("unknown solver 'x'; choose one of: dp", {"solver": "x"}),
        ("unknown device 'x'; choose one of: cpu", {"device": "x"}),
        ("x.json: cannot be read", {"device": "x.json"}),
        ("device is of class int; give its name", {"device": 3}),
        ("a size is 1.5; give bytes", {"budget": 1.5}),
        ("host memory is planned for training", {"mode": "inference", "host_memory": "1GiB"}),
        ("loss is of class str; give a function", {"loss": "mse"}),
        ("donate: ", {"donate": "maybe"}),
        ("autocast to bfloat16: choose", {"autocast": "bfloat16"}),
    ],
)
def test_make_plan(stack: evoplan.EvoformerStack, says: str, given: dict[str, Any]) -> None:
    refused(says, lambda: evoplan.make_plan(stack, (M, Z), **given))


def test_inputs_of_make_plan(stack: evoplan.EvoformerStack) -> None:
    refused("give tensors by name, or a tuple", lambda: evoplan.make_plan(stack, M))
    refused("inputs are of class int", lambda: evoplan.make_plan(stack, 3))  # type: ignore[arg-type]
    refused("inputs: z is of class int", lambda: evoplan.make_plan(stack, (M, 3)))  # type: ignore[arg-type]
    refused("models of others go to evoplan.fit", lambda: evoplan.make_plan(nn.Linear(2, 2), (M,)))  # type: ignore[arg-type]
    refused("n_res must be a whole number", lambda: evoplan.make_plan(stack, (M[:, :, :0], Z[:, :0, :0])))


def test_plans_and_what_they_are_applied_to(stack: evoplan.EvoformerStack, plan: evoplan.Plan) -> None:
    refused("plan is of class str; give what make_plan", lambda: evoplan.apply_plan(stack, "plan.json"))  # type: ignore[arg-type]
    refused("plan is of class int", lambda: evoplan.apply_plan(stack, 3))  # type: ignore[arg-type]
    refused("plan is of class NoneType", lambda: evoplan.apply_plan(stack, [plan, None]))  # type: ignore[list-item]
    refused("stack is of class Linear", lambda: evoplan.apply_plan(nn.Linear(2, 2), plan))  # type: ignore[arg-type]
    refused("ranks is of class int", lambda: evoplan.apply_plan(stack, plan, ranks=2))  # type: ignore[arg-type]
    refused("choose refuse or clip", lambda: evoplan.apply_plan(stack, plan, other_shapes="x"))  # type: ignore[arg-type]
    refused("plan is of class str", lambda: evoplan.verify_plan(stack, "plan.json"))  # type: ignore[arg-type]
    refused("plan is of class str", lambda: evoplan.simulate_plan("plan.json"))  # type: ignore[arg-type]
    refused("a plan's file is of class int", lambda: evoplan.load_plan(3))  # type: ignore[arg-type]
    for module in (stack, evoplan.apply_plan(stack, plan)):
        refused("inputs: m is None; give a tensor", lambda module=module: module(None, None))
        refused("inputs: z is of class list", lambda module=module: module(M, [3]))
        refused("missing a required argument: 'z'; the model takes m, z", lambda module=module: module(M))
        refused("inputs: msa_mask is of class int", lambda module=module: module(M, Z, msa_mask=3))


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("n_block must be a whole number of at least 1, not 'x'", {"n_block": "x"}),
        ("c_m must be a whole number of at least 1, not None", {"c_m": None}),
        ("dropout_msa must be at least 0 and below 1, not 'off'", {"dropout_msa": "off"}),
        ("dropout_msa must be at least 0 and below 1, not nan", {"dropout_msa": float("nan")}),
        ("column_attention must be 'gated' or 'global', not 3", {"column_attention": 3}),
    ],
)
def test_configurations(says: str, given: dict[str, Any]) -> None:
    refused(says, lambda: evoplan.EvoformerConfig(**given))


def test_configurations_of_another_kind() -> None:
    refused("last_m must be True or False", lambda: evoplan.MSAModuleConfig(last_m="no"))  # type: ignore[arg-type]
    refused("class int; give EvoformerConfig", lambda: evoplan.TrunkConfig(3, CONFIG))  # type: ignore[arg-type]
    refused("class str; give EvoformerConfig", lambda: evoplan.EvoformerStack("x"))  # type: ignore[arg-type]
    refused("class EvoformerConfig; give Pair", lambda: evoplan.PairformerStack(CONFIG))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("knobs is of class list; give values by name", {"knobs": [1]}),
        ("kwargs is of class list; give a dictionary", {"kwargs": [1]}),
        ("kwargs have 3; give names", {"kwargs": {3: 1}}),
        ("loss is of class str; give a function", {"loss": "mse"}),
        ("device is of class dtype; give its name", {"device": torch.float32}),
        ("unknown device 'x'; choose one of: cpu", {"device": "x"}),
        ("autocast is of class str; give a dtype", {"autocast": "bfloat16"}),
        ("optimizer is 'adam'; choose", {"optimizer": "adam"}),
    ],
)
def test_fit_and_inspect(says: str, given: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for function in (evoplan.fit, evoplan.inspect):
        refused(says, lambda function=function: function(model, (torch.zeros(2, 4),), **given))


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("plan is of class int; give what", {"plan": 3}),
        ("times is 'x'; choose predicted or roofline or measured", {"times": "x"}),
        ("on_change is None; choose error or unplanned", {"on_change": None}),
        ("a size is 1.5", {"budget": 1.5}),
        (r"\[1\] is not a size", {"budget": [1]}),
    ],
)
def test_fit(says: str, given: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    refused(says, lambda: evoplan.fit(model, (torch.zeros(2, 4),), **given))
