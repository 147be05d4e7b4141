"""Families of models: all that is registered plans, verifies and runs, and one more registers once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from evoplan.cost_model import measure
from evoplan.model import Chain
from evoplan.model.build import build_model, model_without_data
from evoplan.model.config import Family, InputShape, ModelConfig, Preset
from evoplan.model.families import (
    FAMILIES,
    PRESETS,
    EvoformerConfig,
    MSAModuleConfig,
    PairformerConfig,
    TrunkConfig,
    family_of,
    preset,
    register,
)
from evoplan.model.programs.loss import mean_square
from evoplan.model.running.chain import Block, Plannable, laid_out
from evoplan.model.running.submodule import IndependentAxis, Layout, ReductionAxis, Submodule
from evoplan.planner import apply_plan, load_plan, make_plan, verify_plan
from evoplan.planner.commands.cli import main
from tests.conftest import TINY_MSA_MODULE, TINY_PAIRFORMER, random_inputs, random_schedule_of, randomise

NEW = {"pairformer": TINY_PAIRFORMER, "msa-module": TINY_MSA_MODULE}
FLAGS = {
    "pairformer-48": ["--n-blocks", "2", "--n-res", "9", "--c-s", "12", "--c-z", "8"],
    "msa-module-4": ["--n-blocks", "3", "--n-res", "9", "--n-seq", "5", "--c-m", "12", "--c-z", "8"],
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_of_a_family_and_can_be_built(name: str) -> None:
    chosen = preset(name)
    assert name in family_of(chosen.config).presets
    stack = model_without_data(chosen.config.with_blocks(5))
    assert stack.config.n_block == 5
    state = set(chosen.config.state_shapes(chosen.shape))
    for step in Chain.of(stack).steps:
        assert set(step.reads) <= state
        for axis in step.submodule.axes:
            if isinstance(axis, IndependentAxis):
                assert step.submodule.target in axis.cuts


@pytest.mark.parametrize("config", NEW.values(), ids=NEW)
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_are_exact(config: ModelConfig, seed: int) -> None:
    from evoplan.planner.execution.apply import PlannedModule

    stack = randomise(build_model(config).double()).train()
    inputs = random_inputs(config, batch=(2,))
    planned = PlannedModule(stack, random_schedule_of(stack, seed))
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad] + list(stack.parameters())
    found = []
    for model in (stack, planned):
        loss = mean_square(*model(**inputs, dropout_seed=3))
        found.append((loss, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-13, atol=0)
    for expected, got in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("config", NEW.values(), ids=NEW)
def test_measured_peaks_are_predicted(config: ModelConfig) -> None:
    """From the least budget to none."""
    config = config.resized(c_z=24)
    stack = randomise(build_model(config)).train()
    inputs = random_inputs(config, 13, 21, (1,), torch.float32)
    roomy = make_plan(stack, inputs)
    with pytest.raises(ValueError, match="no plan fits") as caught:
        make_plan(stack, inputs, 1)
    least = caught.value.least_feasible_bytes
    assert least < roomy.predicted.peak_bytes
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = round(least + share * (roomy.predicted.peak_bytes - least))
        checked = verify_plan(stack, make_plan(stack, inputs, budget))
        assert checked.ok
        assert 0.985 < checked.measured_peak_bytes / checked.predicted_peak_bytes <= 1.0


def succeed(*arguments: str) -> None:
    code: object = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    assert not code


@pytest.mark.parametrize("model", FLAGS)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_every_command(model: str, mode: str, tmp_path, capsys) -> None:
    plan, picture = str(tmp_path / "plan.json"), str(tmp_path / "sweep.png")
    flags = ["--model", model, *FLAGS[model], "--mode", mode]
    succeed("plan", *flags, "--memory", "2MiB", "--out", plan)
    assert load_plan(plan).problem.config == preset(model).config.resized(
        n_block=int(FLAGS[model][1]), c_z=8, **({"c_s": 12} if "--c-s" in flags else {"c_m": 12})
    )
    for command in (
        ["show", plan],
        ["verify", plan, "--simulate"],
        ["verify", plan],
        ["run", plan, "--steps", "2"],
        ["sweep", *flags, "--points", "3", "--out", picture],
        ["roofline", *flags],
    ):
        if command[0] == "sweep" and mode == "inference":
            continue
        succeed(*command)
    said = capsys.readouterr().out
    assert ("masked-MSA loss" in said) is False
    assert "masked-residue loss" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "pairformer-48", "--n-seq", "3"], "pairformer-48 reads no alignment"),
        (["--model", "pairformer-48", "--c-m", "3"], "this model has no c_m; its sizes are n_block, c_s"),
        (["--model", "msa-module-4", "--c-s", "3"], "this model has no c_s"),
        (["--model", "alphafold2", "--c-s", "3"], "this model has no c_s"),
        (["--model", "msa-module-4", "--n-extra", "3"], "has no extra stack"),
    ],
)
def test_sizes_that_a_family_does_not_have(flags: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *flags])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_the_last_block_of_an_msa_module_makes_no_m() -> None:
    names = [step.name for step in Chain.of(model_without_data(MSAModuleConfig())).steps]
    assert sum(name.endswith("pair_weighted_averaging") for name in names) == 3
    shorter = MSAModuleConfig().with_blocks(2)
    assert [step.name for step in Chain.of(model_without_data(shorter)).steps] == names[:16]
    assert model_without_data(shorter).outputs == ("m", "z")


def test_shapes_from_inputs_by_name() -> None:
    config = PairformerConfig()
    assert config.input_shape({"s": (2, 5, 384), "z": (2, 5, 5, 128)}) == InputShape(None, 5, 2)
    with pytest.raises(ValueError, match=r"z is \(2, 5, 6, 128\), the model and the other inputs need"):
        config.input_shape({"s": (2, 5, 384), "z": (2, 5, 6, 128)})
    with pytest.raises(ValueError, match=r"inputs need a batch dimension: s \[batch, res, c_s\]"):
        config.input_shape({"s": (5, 384), "z": (5, 5, 128)})
    with pytest.raises(ValueError, match="this model needs the rows of an alignment; give --n-seq"):
        EvoformerConfig().state_shapes(InputShape(n_res=5))
    with pytest.raises(ValueError, match="n_res must be a whole number of at least 1"):
        InputShape(5)
    trunk = TrunkConfig(EvoformerConfig(c_m=64, column_attention="global"), EvoformerConfig())
    shapes = trunk.state_shapes(InputShape(3, 5, 2, 7))
    assert shapes["e"] == (2, 7, 5, 64)
    assert trunk.input_shape(shapes) == InputShape(3, 5, 2, 7)


def test_inputs_by_name_or_in_order_make_one_plan() -> None:
    stack = randomise(build_model(TINY_PAIRFORMER))
    inputs = random_inputs(TINY_PAIRFORMER, batch=(1,), dtype=torch.float32)
    by_name, in_order = make_plan(stack, inputs), make_plan(stack, inputs.values())
    assert by_name.schedule == in_order.schedule
    with pytest.raises(ValueError, match="the model takes s, z, single_mask, pair_mask"):
        make_plan(stack, {**inputs, "m": inputs["s"]})
    with pytest.raises(ValueError, match="inputs: z is None; give a tensor"):
        make_plan(stack, {**inputs, "z": None})


# --- a family that is registered here ---------------------------------------------------------


class Mixing(Submodule):
    """x_i += W sum_j softmax_j(...) of a sequence: a mean over all positions, then a projection."""

    layout = Layout({"x": ("position", "c_x")}, {"x_mask": ("position",)})
    target = "x"
    context_inputs = ("x", "x_mask")
    piece_inputs = ("x",)
    context_dims = ("position", "channel")
    context_axis = ("position",)

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"x": nn.LayerNorm(config.c_x)})
        self.linear_v = nn.Linear(config.c_x, config.c_x, bias=False)
        self.linear_q = nn.Linear(config.c_x, config.c_x, bias=False)
        self.axes = (self.along("position"), ReductionAxis("channel", config.c_x, concatenate=True))

    def context(self, x: Tensor, x_mask: Tensor, part: slice = slice(None)) -> Tensor:
        return (x @ self.linear_v.weight[part].T) * x_mask[..., None]

    def piece(self, x: Tensor, context: Tensor, part: slice = slice(None)) -> Tensor:
        return (x @ self.linear_q.weight[part].T).sigmoid() * context.mean(dim=-2, keepdim=True)


class MixerBlock(Block):
    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.mixing = Mixing(config)


@dataclass(frozen=True)
class MixerConfig(ModelConfig):
    state: ClassVar = {"x": ("batch", "res", "c_x")}
    masks: ClassVar = {"x_mask": "x"}

    n_block: int = 3
    c_x: int = 16

    @property
    def widest(self) -> int:
        return self.c_x


class Mixer(Plannable):
    outputs = ("x",)

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(MixerBlock(config) for _ in range(config.n_block))

    def prepare(self, x: Tensor, x_mask: Tensor | None = None):
        mask = x.new_ones(x.shape[:-1]) if x_mask is None else x_mask.to(x.dtype)
        return laid_out(x=x), {"x_mask": mask}


@pytest.fixture
def mixer():
    name = f"{__name__}:Mixer"
    presets = {"mixer": Preset(MixerConfig(), InputShape(n_res=24), "a mixer")}
    register(Family("mixer", MixerConfig, stack=name, presets=presets, instead="your own loop"))
    yield "mixer"
    del FAMILIES["mixer"], PRESETS["mixer"]


def test_a_family_registers_once(mixer: str, tmp_path, capsys) -> None:
    plan = str(tmp_path / "plan.json")
    succeed("plan", "--model", mixer, "--n-blocks", "4", "--memory", "60KiB", "--out", plan)
    for flags in (["--ranks", "2"], ["--mode", "inference"]):
        succeed("plan", "--model", mixer, *flags)
    succeed("verify", plan)
    assert "4 blocks, r=24" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", plan])
    assert "mixer has no program; use your own loop" in capsys.readouterr().err
    loaded = load_plan(plan)
    stack = randomise(build_model(loaded.problem.config)).train()
    inputs = random_inputs(loaded.problem.config, r=24, batch=(1,), dtype=torch.float32)
    planned = apply_plan(stack, loaded)
    assert torch.equal(planned(**inputs)[0], stack(**inputs)[0])
    peak = measure.peak_bytes(lambda: mean_square(*planned(**inputs)).backward())
    assert peak > 0
    with pytest.raises(ValueError, match="mixer is registered already"):
        register(Family("other", MixerConfig, stack="", presets={"mixer": PRESETS["mixer"]}))
    assert "torch" in sys.modules  # what is registered names its model, and loads it when it is needed


def test_a_submodule_without_a_layout_is_told() -> None:
    class Undeclared(Submodule):
        target = "x"
        piece_inputs = ("x",)

    with pytest.raises(TypeError, match="the layout of Undeclared has no x; declare what it reads"):
        print(Undeclared().reads)
