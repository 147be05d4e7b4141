"""Our Pairformer and MSA module against OpenFold3's, which nobody here wrote: in float64, weights the same.

Outputs and every gradient, as in `test_oracle`. OpenFold3 would mask what its transitions write; Alg. 11 does
not, and it is not asked to here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evoplan.model.build import build_model
from evoplan.model.config import ModelConfig
from evoplan.model.families import MSAModuleConfig, PairformerConfig
from tests.conftest import TINY_MSA_MODULE, TINY_PAIRFORMER, random_inputs, randomise
from tests.test_oracle import _ATTENTION, _TRIANGLE_MULTIPLICATION, assert_same

with warnings.catch_warnings(record=True):
    from openfold3.core.model.latent.msa_module import MSAModuleStack as OpenFoldMSAModule
    from openfold3.core.model.latent.pairformer import PairFormerStack as OpenFoldPairformer

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")

_SWIGLU = {"linear_1": "swiglu.linear_a", "linear_1_gated": "swiglu.linear_b", "linear_2": "linear_out"}
_TRIANGLE_ATTENTION = {"norms.z": "layer_norm", "linear_b": "linear_z", **_ATTENTION}
_PAIR = {
    "triangle_outgoing": ("pair_stack.tri_mul_out", _TRIANGLE_MULTIPLICATION),
    "triangle_incoming": ("pair_stack.tri_mul_in", _TRIANGLE_MULTIPLICATION),
    "triangle_starting": ("pair_stack.tri_att_start", _TRIANGLE_ATTENTION),
    "triangle_ending": ("pair_stack.tri_att_end", _TRIANGLE_ATTENTION),
    "pair_transition": ("pair_stack.pair_transition", {"norms.z": "layer_norm", **_SWIGLU}),
}
_SINGLE = {"norms.s": "layer_norm_a", "norms.z": "layer_norm_z", "linear_b": "linear_z"}
_AVERAGING = {"norms.m": "layer_norm_m", "norms.z": "layer_norm_z", "linear_b": "linear_z"}
# Our submodule: theirs, and the layers of ours: of theirs.
LAYERS = {
    **_PAIR,
    "single_attention": (
        "attn_pair_bias",
        {**_SINGLE, **{f"linear_{x}": f"mha.linear_{x}" for x in "qkvgo"}},
    ),
    "single_transition": ("single_transition", {"norms.s": "layer_norm", **_SWIGLU}),
    "outer_product_mean": (
        "outer_product_mean",
        {"norms.m": "layer_norm", "linear_a": "linear_1", "linear_b": "linear_2", "linear_out": "linear_out"},
    ),
    "pair_weighted_averaging": (
        "msa_att_row",
        {**_AVERAGING, **{f"linear_{x}": f"linear_{x}" for x in "vgo"}},
    ),
    "msa_transition": ("msa_transition", {"norms.m": "layer_norm", **_SWIGLU}),
}


def openfold_pairformer(config: PairformerConfig) -> nn.Module:
    return OpenFoldPairformer(
        c_s=config.c_s,
        c_hidden_pair_bias=config.c_head_single,
        no_heads_pair_bias=config.n_head_single,
        **_common(config),
    )


def openfold_msa_module(config: MSAModuleConfig) -> nn.Module:
    return OpenFoldMSAModule(
        c_m=config.c_m,
        c_hidden_msa_att=config.c_head_msa,
        no_heads_msa=config.n_head_msa,
        c_hidden_opm=config.c_opm,
        msa_dropout=0.0,
        opm_first=True,
        eps=1e-3,
        **_common(config),
    )


def _common(config: PairformerConfig | MSAModuleConfig) -> dict:
    return {
        "c_z": config.c_z,
        "c_hidden_mul": config.c_tri,
        "c_hidden_pair_att": config.c_head,
        "no_heads_pair": config.n_head_pair,
        "no_blocks": config.n_block,
        "transition_type": "swiglu",
        "transition_n": config.transition_factor,
        "pair_dropout": 0.0,
        "fuse_projection_weights": False,
        "blocks_per_ckpt": None,
        "inf": 1e9,
    }


def parameter_names(ours: nn.Module, theirs: nn.Module) -> dict[str, str]:
    """Our parameter: theirs. Every parameter of either stack is in it exactly once."""
    names = {}
    for name, _ in ours.named_parameters():
        _, number, submodule, rest = name.split(".", 3)
        layer, _, kind = rest.rpartition(".")
        other, layers = LAYERS[submodule]
        names[name] = f"blocks.{number}.{other}.{layers[layer]}.{kind}"
    assert sorted(names.values()) == sorted(name for name, _ in theirs.named_parameters())
    return names


CASES: list[tuple[ModelConfig, Callable[..., nn.Module]]] = [
    (TINY_PAIRFORMER.with_dropout(0.0), openfold_pairformer),
    (TINY_MSA_MODULE.with_dropout(0.0), openfold_msa_module),
    (PairformerConfig(n_block=1).with_dropout(0.0), openfold_pairformer),
    (MSAModuleConfig(n_block=2).with_dropout(0.0), openfold_msa_module),
]


@pytest.mark.parametrize("padded", [False, True], ids=["random", "padded"])
@pytest.mark.parametrize(("config", "openfold"), CASES, ids=["tiny-s", "tiny-m", "pairformer", "msa-module"])
def test_outputs_and_gradients(config: ModelConfig, openfold: Callable[..., nn.Module], padded: bool) -> None:
    ours = randomise(build_model(config).double())
    theirs = openfold(config).double()
    names = parameter_names(ours, theirs)
    theirs.load_state_dict({names[name]: p for name, p in ours.named_parameters()}, strict=True)
    mine = random_inputs(config, s=5, r=7, batch=(1,))
    if padded:  # the last residue and the last row are not there
        for name in config.masks:
            mine[name][..., -1] = 0
            if name != "single_mask":
                mine[name][..., -1, :] = 0
    other = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in mine.items()}
    got, expected = ours(**mine), theirs(**other, _mask_trans=False)
    state = list(config.state)
    outputs = dict(zip(ours.outputs, got, strict=True))
    expected = dict(zip(state, expected if isinstance(expected, tuple) else (expected,), strict=False))
    expected = expected if len(expected) == len(state) else {state[-1]: next(iter(expected.values()))}
    for name, output in outputs.items():
        assert_same(f"output {name}", output, expected[name])
    for results in (outputs, expected):
        _loss([results[name] for name in outputs]).backward()
    for name in state:
        assert_same(f"gradient of {name}", mine[name].grad, other[name].grad)
    for name, parameter in ours.named_parameters():
        gradient = theirs.get_parameter(names[name]).grad
        # What shifts all logits of a query alike has a gradient of rounding: the scale is its weight's.
        of_bias = name.endswith(("single_attention.norms.z.bias", "pair_weighted_averaging.norms.z.bias"))
        scale = ours.get_parameter(name.removesuffix("bias") + "weight").grad if of_bias else None
        assert_same(f"gradient of {name}", parameter.grad, gradient, scale)


def _loss(tensors: list[Tensor]) -> Tensor:
    g = torch.Generator().manual_seed(7)
    terms = [(torch.randn(x.shape, generator=g, dtype=x.dtype) * x.square()).mean() for x in tensors]
    return sum(terms, terms[0].new_zeros(()))


def test_parameter_counts() -> None:
    for config, openfold in CASES[2:]:
        counts = {
            sum(p.numel() for p in model.parameters()) for model in (build_model(config), openfold(config))
        }
        assert len(counts) == 1
