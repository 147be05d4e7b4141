"""Our block against OpenFold3's, which nobody here wrote: same outputs, same gradients, in float64.

OpenFold3's block is AlphaFold 2's once three of its AlphaFold 3 choices are undone (`openfold_block`,
`run_openfold`). Both take LayerNorm's eps as 1e-5, the outer product mean's as 1e-3 and add -1e9 to
masked logits, as AlphaFold's code does, so no tolerance hides a convention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from evoplan.model import PRESETS, EvoformerConfig, EvoformerStack
from evoplan.model.modules.evoformer import EvoformerBlock
from tests.conftest import TINY, TINY_EXTRA, random_inputs, randomise

# It warns of GPU kernels that are not there, and puts its own filter before ours.
with warnings.catch_warnings(record=True):
    from openfold3.core.config.default_linear_init_config import evo_block_init, msa_global_att_init
    from openfold3.core.model.latent.evoformer import EvoformerBlock as OpenFoldBlock
    from openfold3.core.model.layers.msa import MSAColumnGlobalAttention

# Its attention enters CUDA's autocast on every device.
pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")

TOLERANCE = 1e-10  # of the largest entry

_ATTENTION = {f"attention.linear_{x}": f"mha.linear_{x}" for x in "qkvgo"}
_TRIANGLE_ATTENTION = {"norms.z": "layer_norm", "linear_b": "linear_z", **_ATTENTION}
_TRIANGLE_MULTIPLICATION = {
    "norms.z": "layer_norm_in",
    "linear_a": "linear_a_p",
    "linear_a_gate": "linear_a_g",
    "linear_b": "linear_b_p",
    "linear_b_gate": "linear_b_g",
    "norm_product": "layer_norm_out",
    "linear_out": "linear_z",
    "linear_gate": "linear_g",
}
_TRANSITION = {"linear_1": "transition_mlp.layers.0.0", "linear_2": "transition_mlp.linear_out"}

# Our submodule: theirs, and the layers of ours: of theirs.
LAYERS: dict[str, tuple[str, dict[str, str]]] = {
    "row_attention": (
        "msa_att_row",
        {"norms.m": "layer_norm_m", "norms.z": "layer_norm_z", "linear_b": "linear_z", **_ATTENTION},
    ),
    "column_attention": ("msa_att_col._msa_att", {"norms.m": "layer_norm_m", **_ATTENTION}),
    "msa_transition": ("msa_transition", {"norms.m": "layer_norm", **_TRANSITION}),
    "outer_product_mean": (
        "outer_product_mean",
        {
            "norms.m": "layer_norm",
            "linear_a": "linear_1",
            "linear_b": "linear_2",
            "linear_out": "linear_out",
        },
    ),
    "triangle_outgoing": ("pair_stack.tri_mul_out", _TRIANGLE_MULTIPLICATION),
    "triangle_incoming": ("pair_stack.tri_mul_in", _TRIANGLE_MULTIPLICATION),
    "triangle_starting": ("pair_stack.tri_att_start", _TRIANGLE_ATTENTION),
    "triangle_ending": ("pair_stack.tri_att_end", _TRIANGLE_ATTENTION),
    "pair_transition": ("pair_stack.pair_transition", {"norms.z": "layer_norm", **_TRANSITION}),
}
COLUMN_GLOBAL_ATTENTION = (
    "msa_att_col",
    {"norms.m": "layer_norm_m", **{f"linear_{x}": f"global_attention.linear_{x}" for x in "qkvgo"}},
)


def openfold_block(config: EvoformerConfig) -> nn.Module:
    """OpenFold3's block with AlphaFold 2's biases and AlphaFold 2's ending-node attention."""
    init = evo_block_init.copy_and_resolve_references()
    for attention in (init.msa_row_att, init.msa_col_att, init.pair_block.tri_att):
        attention.mha.linear_g.bias = attention.mha.linear_o.bias = True
    for layer in (*init.pair_block.tri_mul.values(), init.opm.linear_1, init.opm.linear_2):
        layer.bias = True
    block = OpenFoldBlock(
        c_m=config.c_m,
        c_z=config.c_z,
        c_hidden_msa_att=config.c_head_msa,
        c_hidden_opm=config.c_opm,
        c_hidden_mul=config.c_tri,
        c_hidden_pair_att=config.c_head,
        no_heads_msa=config.n_head_msa,
        no_heads_pair=config.n_head_pair,
        transition_type="relu",
        transition_n=config.transition_factor,
        msa_dropout=config.dropout_msa,
        pair_dropout=config.dropout_pair,
        no_column_attention=False,
        opm_first=False,
        fuse_projection_weights=False,
        inf=1e9,
        eps=1e-3,  # unused: its outer product mean is built with its own default, 1e-3
        linear_init_params=init,
    )
    # Suppl. Alg. 14 adds b_ki to the logit of query ij and key kj, on the transposed z the bias of row i,
    # column k. The block asks for b_ik, as its argument and not as a setting, so it is overruled here.
    block.pair_stack.tri_att_end.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "transpose_bias": False}), with_kwargs=True
    )
    if config.column_attention == "global":
        block.msa_att_col = openfold_column_global_attention(config)
    return block


def openfold_column_global_attention(config: EvoformerConfig) -> nn.Module:
    """OpenFold3's, with AlphaFold 2's biases: it has one, though no block of its own uses it any longer."""
    init = msa_global_att_init.copy_and_resolve_references()
    init.mha.linear_g.bias = init.mha.linear_o.bias = True
    attention = MSAColumnGlobalAttention(
        config.c_m, config.c_head_msa, config.n_head_msa, linear_init_params=init
    )
    # The block also hands on which kernels to use, for which this one has no choice.
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"mask": kwargs["mask"]}), with_kwargs=True
    )
    return attention


def parameter_names(ours: nn.Module, theirs: nn.Module) -> dict[str, str]:
    """Our parameter: theirs. Every parameter of either block is in it exactly once."""
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    is_global = isinstance(theirs.get_submodule("msa_att_col"), MSAColumnGlobalAttention)
    pairs = {**LAYERS, "column_attention": COLUMN_GLOBAL_ATTENTION} if is_global else LAYERS
    table = [
        (f"{our_submodule}.{our_layer}.{kind}", f"{their_submodule}.{their_layer}.{kind}")
        for our_submodule, (their_submodule, layers) in pairs.items()
        for our_layer, their_layer in layers.items()
        for kind in ("weight", "bias")
        if f"{our_submodule}.{our_layer}.{kind}" in shapes
    ]
    assert sorted(name for name, _ in table) == sorted(shapes)
    assert sorted(name for _, name in table) == sorted(name for name, _ in theirs.named_parameters())
    return dict(table)


def paired_models(config: EvoformerConfig) -> tuple[EvoformerStack, nn.ModuleList]:
    """Our stack with random weights everywhere, and OpenFold3's blocks with the same weights."""
    ours = EvoformerStack(config).double()
    randomise(ours)
    theirs = nn.ModuleList(openfold_block(config) for _ in ours.blocks).double()
    for block, oracle in zip(ours.blocks, theirs, strict=True):
        names = parameter_names(block, oracle)
        oracle.load_state_dict({names[name]: p for name, p in block.named_parameters()}, strict=True)
    return ours, theirs


def paired_parameters(ours: EvoformerStack, theirs: nn.ModuleList) -> Iterator[tuple[str, Tensor, Tensor]]:
    for index, (block, oracle) in enumerate(zip(ours.blocks, theirs, strict=True)):
        for our_name, their_name in parameter_names(block, oracle).items():
            yield f"{index}.{our_name}", block.get_parameter(our_name), oracle.get_parameter(their_name)


def run_openfold(
    blocks: nn.ModuleList, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor
) -> tuple[Tensor, Tensor]:
    for block in blocks:
        # AlphaFold 2 does not mask its transitions; OpenFold3's comment on the flag says so too.
        m, z = block(m, z, msa_mask, pair_mask, _mask_trans=False)
    return m, z


def loss(m: Tensor, z: Tensor) -> Tensor:
    """Mean square of the outputs, every entry under a random weight of its own."""
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in (m, z)]
    return sum(((w * x.square()).mean() for w, x in zip(weights, (m, z), strict=True)), m.new_zeros(()))


def masked(inputs: dict[str, Tensor], masks: str) -> dict[str, Tensor]:
    """The inputs under random masks, under no mask, or with rows and columns that are masked entirely."""
    msa_mask, pair_mask = inputs["msa_mask"].clone(), inputs["pair_mask"].clone()
    if masks == "ones":
        msa_mask.fill_(1)
        pair_mask.fill_(1)
    elif masks == "padded":
        # An empty sequence, and a residue in no sequence. Without any key, -1e9 cancels in the softmax,
        # but rounds the logits to 1e-7. Both sides round the same sums: mask first, then pair bias.
        msa_mask[1] = msa_mask[:, 2] = 0
        pair_mask[2] = pair_mask[:, 2] = 0
    return {**inputs, "msa_mask": msa_mask, "pair_mask": pair_mask}


def assert_same(name: str, ours: Tensor | None, theirs: Tensor | None, scale: Tensor | None = None) -> None:
    assert ours is not None, f"{name} is missing on our side"
    assert theirs is not None, f"{name} is missing on their side"
    assert ours.shape == theirs.shape
    largest = (theirs if scale is None else scale).abs().max()
    assert largest > 0, f"{name} shows nothing: it is zero on their side"
    error = ((ours - theirs).abs().max() / largest).item()
    assert error <= TOLERANCE, f"{name} differs by {error:.1e} of the largest entry"


@pytest.mark.parametrize(("model", "count"), [("alphafold2", 1_829_952), ("alphafold2-extra", 701_312)])
def test_parameter_count(model: str, count: int) -> None:
    config = PRESETS[model].config
    for block in (EvoformerBlock(config), openfold_block(config)):
        assert sum(p.numel() for p in block.parameters()) == count


@pytest.mark.parametrize("masks", ["ones", "random", "padded"])
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY_EXTRA,
        EvoformerConfig(n_block=1),
        replace(PRESETS["alphafold2-extra"].config, n_block=1),
    ],
    ids=["tiny", "tiny-extra", "alphafold2", "alphafold2-extra"],
)
def test_outputs_and_gradients(config: EvoformerConfig, masks: str) -> None:
    config = config.with_dropout(0.0)
    ours, theirs = paired_models(config)
    mine = masked(random_inputs(config, s=5, r=7), masks)
    other = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in mine.items()}
    our_outputs, their_outputs = ours(**mine), run_openfold(theirs, **other)
    for name, got, expected in zip("mz", our_outputs, their_outputs, strict=True):
        assert_same(f"output {name}", got, expected)

    loss(*our_outputs).backward()
    loss(*their_outputs).backward()
    for name in "mz":
        assert_same(f"gradient of {name}", mine[name].grad, other[name].grad)
    for name, got, expected in paired_parameters(ours, theirs):
        scale = None
        if name.endswith("row_attention.norms.z.bias"):
            # It shifts all logits of a query alike, which softmax ignores: its gradient is zero, and what
            # either side computes is rounding. The scale is that of the same layer's weight.
            scale = ours.get_parameter("blocks." + name.removesuffix("bias") + "weight").grad
        assert_same(f"gradient of {name}", got.grad, expected.grad, scale)
