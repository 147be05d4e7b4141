"""AlphaFold 3's Pairformer and MSA module: blocks and stacks of submodules, most of which AlphaFold 2 has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evoplan.model.families import MSAModuleConfig, PairformerConfig
from evoplan.model.modules.attention import mask_bias
from evoplan.model.modules.evoformer import initialise, mask_constants, mask_for
from evoplan.model.modules.outer_product_mean import OuterProductMean
from evoplan.model.modules.representations import ALPHAFOLD
from evoplan.model.modules.triangle_attention import TriangleAttention
from evoplan.model.modules.triangle_multiplication import TriangleMultiplication
from evoplan.model.running.chain import Block, Plannable, State, laid_out
from evoplan.model.running.layers import FULL, last_columns, rows, times
from evoplan.model.running.remake import cheap
from evoplan.model.running.submodule import ReductionAxis, Submodule
from evoplan.model.running.unread import affine_at_the_end


class SwiGLUTransition(Submodule):
    """(swish(x W1) * x V1) W2 on every position of one representation.

    Source: Abramson et al. (2024), Suppl. Alg. 11.
    """

    layout = ALPHAFOLD
    positionwise = True

    def __init__(self, target: str, c: int, factor: int, axis: str) -> None:
        super().__init__()
        self.target, self.piece_inputs = target, (target,)
        self.norms = nn.ModuleDict({target: nn.LayerNorm(c)})
        self.linear_1 = nn.Linear(c, factor * c, bias=False)
        self.linear_1_gated = nn.Linear(c, factor * c, bias=False)
        self.linear_2 = nn.Linear(factor * c, c, bias=False)
        self.axes = (self.along(axis), ReductionAxis("channel", factor * c))

    @affine_at_the_end
    def piece(self, x: Tensor, context: None = None, part: slice = FULL) -> Tensor:
        gate = cheap(F.silu, rows(self.linear_1, x, part))
        hidden = cheap(torch.mul, gate, rows(self.linear_1_gated, x, part))
        del gate
        return last_columns(self.linear_2, hidden, part)


class SingleAttentionWithPairBias(Submodule):
    """Attention of every token to all others, biased by the pair representation.

    Keys and values are the context: pieces are queries, each with its row of the bias.

    Source: Abramson et al. (2024), Suppl. Alg. 24 without conditioning, as Alg. 17 calls it; tokens that are
    missing are no keys, as in AlphaFold 3's code.
    """

    layout = ALPHAFOLD
    target = "s"
    context_inputs = ("s",)
    piece_inputs = ("s", "z", "single_mask")
    context_dims = ("res", "channel")
    context_axis = ("res",)

    def __init__(self, config: PairformerConfig) -> None:
        super().__init__()
        self.c_head = config.c_head_single
        width = config.n_head_single * config.c_head_single
        self.norms = nn.ModuleDict({"s": nn.LayerNorm(config.c_s), "z": nn.LayerNorm(config.c_z)})
        self.linear_b = nn.Linear(config.c_z, config.n_head_single, bias=False)
        self.linear_q = nn.Linear(config.c_s, width)
        self.linear_k = nn.Linear(config.c_s, width, bias=False)
        self.linear_v = nn.Linear(config.c_s, width, bias=False)
        self.linear_g = nn.Linear(config.c_s, width, bias=False)
        self.linear_o = nn.Linear(width, config.c_s, bias=False)
        self.axes = (self.along("res", "row"), ReductionAxis("head", config.n_head_single))

    def context(self, s: Tensor, part: slice = FULL) -> Tensor:
        width = times(part, self.c_head)  # of the heads
        return torch.cat([rows(linear, s, width) for linear in (self.linear_k, self.linear_v)], dim=-1)

    @affine_at_the_end
    def piece(self, s: Tensor, z: Tensor, single_mask: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        width = times(part, self.c_head)
        k, v = (self._split(half) for half in context.chunk(2, dim=-1))
        q = self._split(rows(self.linear_q, s, width, self.c_head**-0.5))
        logits = q @ k.transpose(-1, -2)  # [*, heads, queries, r]
        logits += mask_bias(single_mask, logits.dtype)[..., None, None, :]
        logits += rows(self.linear_b, z, part).movedim(-1, -3)
        weights = logits.softmax(dim=-1)
        del q, logits
        attended = (weights @ v).transpose(-2, -3).flatten(-2)  # [*, queries, heads * c]
        gate = cheap(torch.sigmoid, rows(self.linear_g, s, width))
        return last_columns(self.linear_o, cheap(torch.mul, gate, attended), width)

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.c_head))
        return heads.transpose(-2, -3)  # [*, heads, n, c]


class MSAPairWeightedAveraging(Submodule):
    """Each row of the alignment averaged over its residues, with weights that the pairs give.

    Source: Abramson et al. (2024), Suppl. Alg. 10; pairs that are missing weigh nothing, as in AlphaFold 3's
    code; row-wise dropout, Alg. 8.
    """

    layout = ALPHAFOLD
    target = "m"
    context_inputs = ("z", "pair_mask")
    piece_inputs = ("m",)
    context_dims = ("head", "row", "column")
    context_axis = ("row",)
    dropout_shared = "seq"

    def __init__(self, config: MSAModuleConfig) -> None:
        super().__init__()
        self.c_head = config.c_head_msa
        width = config.n_head_msa * config.c_head_msa
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m), "z": nn.LayerNorm(config.c_z)})
        self.linear_b = nn.Linear(config.c_z, config.n_head_msa, bias=False)
        self.linear_v = nn.Linear(config.c_m, width, bias=False)
        self.linear_g = nn.Linear(config.c_m, width, bias=False)
        self.linear_o = nn.Linear(width, config.c_m, bias=False)
        self.dropout = config.dropout_msa
        self.axes = (self.along("seq"), ReductionAxis("head", config.n_head_msa))

    def context(self, z: Tensor, pair_mask: Tensor, part: slice = FULL) -> Tensor:
        logits = rows(self.linear_b, z, part).movedim(-1, -3)  # [*, heads, r, r]
        logits = logits + mask_bias(pair_mask, logits.dtype).unsqueeze(-3)
        return logits.softmax(dim=-1)

    @affine_at_the_end
    def piece(self, m: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        width = times(part, self.c_head)
        v = rows(self.linear_v, m, width).unflatten(-1, (-1, self.c_head)).transpose(-2, -3)
        averages = (context.unsqueeze(-4) @ v).transpose(-2, -3).flatten(-2)  # [*, s, r, heads * c]
        del v
        gate = cheap(torch.sigmoid, rows(self.linear_g, m, width))
        return last_columns(self.linear_o, cheap(torch.mul, gate, averages), width)


class _PairBlock(Block):
    """The five submodules on z that both blocks share (Suppl. Alg. 8 and 17)."""

    def _add_pair_stack(self, config: PairformerConfig | MSAModuleConfig) -> None:
        self.triangle_outgoing = TriangleMultiplication(config, "outgoing", bias=False)
        self.triangle_incoming = TriangleMultiplication(config, "incoming", bias=False)
        of_attention = {"bias": False, "transposed_bias": False}
        self.triangle_starting = TriangleAttention(config, "starting", **of_attention)
        self.triangle_ending = TriangleAttention(config, "ending", **of_attention)
        self.pair_transition = SwiGLUTransition("z", config.c_z, config.transition_factor, "row")


class PairformerBlock(_PairBlock):
    """Seven submodules; 3,070,848 parameters at the defaults.

    Source: Abramson et al. (2024), Suppl. Alg. 17.
    """

    def __init__(self, config: PairformerConfig) -> None:
        super().__init__()
        self._add_pair_stack(config)
        self.single_attention = SingleAttentionWithPairBias(config)
        self.single_transition = SwiGLUTransition("s", config.c_s, config.transition_factor, "res")


class MSAModuleBlock(_PairBlock):
    """Eight submodules, 758,272 parameters at the defaults; or the six that rewrite z.

    Args:
        makes_m: whether somebody reads the m after this block.

    Source: Abramson et al. (2024), Suppl. Alg. 8.
    """

    def __init__(self, config: MSAModuleConfig, makes_m: bool = True) -> None:
        super().__init__()
        self.outer_product_mean = OuterProductMean(config, bias=False)
        if makes_m:
            self.pair_weighted_averaging = MSAPairWeightedAveraging(config)
            self.msa_transition = SwiGLUTransition("m", config.c_m, config.transition_factor, "seq")
        self._add_pair_stack(config)


class PairformerStack(Plannable):
    """Blocks in sequence over the state (s, z).

    Inputs: s [*, r, c_s], z [*, r, r, c_z], and their masks, single_mask [*, r] and pair_mask [*, r, r]
    (1 where there is data; all ones when not given). Returns the new (s, z).

    Source: Abramson et al. (2024), Suppl. Alg. 17.
    """

    config: PairformerConfig
    outputs = ("s", "z")

    def __init__(self, config: PairformerConfig) -> None:
        super().__init__()
        self.config = PairformerConfig.checked(config)
        self.blocks = nn.ModuleList(PairformerBlock(config) for _ in range(config.n_block))
        initialise(self)

    def prepare(
        self, s: Tensor, z: Tensor, single_mask: Tensor | None = None, pair_mask: Tensor | None = None
    ) -> tuple[State, dict[str, Tensor]]:
        """The state and the constants of its chain."""
        masks = {"single_mask": mask_for("s", s, single_mask), "pair_mask": mask_for("z", z, pair_mask)}
        return laid_out(s=s, z=z), masks


class MSAModuleStack(Plannable):
    """Blocks in sequence over the state (m, z); sampling and embedding of the alignment lie before it.

    Inputs: m [*, s, r, c_m], z [*, r, r, c_z], and their masks, msa_mask [*, s, r] and pair_mask [*, r, r]
    (1 where there is data; all ones when not given). Returns the new z, and before it m where the
    configuration wants it.

    Source: Abramson et al. (2024), Suppl. Alg. 8, lines 5-15.
    """

    config: MSAModuleConfig

    def __init__(self, config: MSAModuleConfig) -> None:
        super().__init__()
        self.config = MSAModuleConfig.checked(config)
        self.outputs = ("m", "z") if config.last_m else ("z",)
        last = config.n_block - 1
        self.blocks = nn.ModuleList(
            MSAModuleBlock(config, makes_m=config.last_m or number < last) for number in range(config.n_block)
        )
        initialise(self)

    def prepare(
        self, m: Tensor, z: Tensor, msa_mask: Tensor | None = None, pair_mask: Tensor | None = None
    ) -> tuple[State, dict[str, Tensor]]:
        """The state and the constants of its chain."""
        return laid_out(m=m, z=z), mask_constants(m, z, msa_mask, pair_mask)
