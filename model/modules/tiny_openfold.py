"""TinyOpenFold: a small Evoformer without masks, biases, dropout or gated attention; it predicts distances.

Source: AMD's HPCTrainingExamples, TinyOpenFold, version 1. Its triangle submodules normalise twice, its outer
product has one projection for both factors, and each block has a normalisation that nothing reads.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evoplan.model.families import TinyOpenFoldConfig
from evoplan.model.modules.attention import Attention, transposed
from evoplan.model.modules.representations import ALPHAFOLD
from evoplan.model.running.chain import Block, Plannable, State, laid_out
from evoplan.model.running.in_place import relu_over
from evoplan.model.running.internals import has_hooks
from evoplan.model.running.layers import FULL, last_columns, rows, times
from evoplan.model.running.layout import channels_first, channels_last
from evoplan.model.running.regions import region
from evoplan.model.running.remake import cheap
from evoplan.model.running.submodule import ReductionAxis, Submodule
from evoplan.model.running.unread import affine_at_the_end

LARGEST_DISTANCE = 20.0  # Angstrom; the head's sigmoid is scaled by it
MSA_EMBEDDING, PAIR_EMBEDDING, HEAD, LOSS = (
    "msa_embedding",
    "pair_embedding",
    "distance_head",
    "loss",
)  # regions


def _twice(c: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(c), nn.LayerNorm(c))


class TinyRowAttention(Submodule):
    """Attention along each row of the alignment, biased by the pair representation as it is."""

    layout = ALPHAFOLD
    target = "m"
    context_inputs = ("z",)
    piece_inputs = ("m",)
    context_dims = ("head", "row", "column")
    context_axis = ("row",)
    attends = True

    def __init__(self, config: TinyOpenFoldConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m)})
        self.linear_b = nn.Linear(config.c_z, config.n_head_msa, bias=False)
        self.attention = Attention(config.c_m, config.n_head_msa, config.c_head_msa, gated=False)
        self.axes = (self.along("seq"), ReductionAxis("head", config.n_head_msa))

    def context(self, z: Tensor, part: slice = FULL) -> Tensor:
        return rows(self.linear_b, z, part).movedim(-1, -3)  # [*, heads, r, r]

    @affine_at_the_end
    def piece(self, m: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        update: Tensor = self.attention(m, None, context, part)
        return update


class TinyAttention(Submodule):
    """Attention along the columns of m or, normalised twice, along the rows or columns of z; no bias."""

    layout = ALPHAFOLD
    attends = True

    def __init__(
        self, config: TinyOpenFoldConfig, target: Literal["m", "z"], along: Literal["row", "column"]
    ) -> None:
        super().__init__()
        on_m = target == "m"
        self.target, self.piece_inputs, self.along_rows = target, (target,), along == "row"
        c, n_head = (config.c_m, config.n_head_msa) if on_m else (config.c_z, config.n_head_pair)
        self.norms = nn.ModuleDict({target: nn.LayerNorm(c) if on_m else _twice(c)})
        self.attention = Attention(c, n_head, c // n_head, gated=False)
        self.axes = (self.along("res" if on_m else along), ReductionAxis("head", n_head))

    @affine_at_the_end
    def piece(self, x: Tensor, context: None = None, part: slice = FULL) -> Tensor:
        update: Tensor
        if self.along_rows:
            update = self.attention(x, None, None, part)
            return update
        update = self.attention(cheap(transposed, x), None, None, part)
        return transposed(update)


class TinyTransition(Submodule):
    """relu(x W1) W2 on every position of one stream."""

    layout = ALPHAFOLD
    positionwise = True

    def __init__(self, target: str, c: int, factor: int, axis: str) -> None:
        super().__init__()
        self.target, self.piece_inputs = target, (target,)
        self.norms = nn.ModuleDict({target: nn.LayerNorm(c)})
        self.linear_1 = nn.Linear(c, factor * c, bias=False)
        self.linear_2 = nn.Linear(factor * c, c, bias=False)
        self.axes = (self.along(axis), ReductionAxis("channel", factor * c))

    @affine_at_the_end
    def piece(self, x: Tensor, context: None = None, part: slice = FULL) -> Tensor:
        # Two-dimensional, so that the product is no view and relu can write into it.
        hidden = rows(self.linear_1, x.flatten(0, -2), part)
        hidden = hidden.relu() if has_hooks(self.linear_1) else relu_over(hidden)
        return last_columns(self.linear_2, hidden.unflatten(0, x.shape[:-1]), part)


class TinyOuterProductMean(Submodule):
    """z_ij += W mean_s (a_si outer a_sj): both factors are the same projection.

    The projection runs twice, in the context and in the pieces: 0.3 % more arithmetic.
    """

    layout = ALPHAFOLD
    target = "z"
    context_inputs = ("m",)
    piece_inputs = ("m",)
    context_dims = ("seq", "res", "channel")
    context_axis = ("res",)

    def __init__(self, config: TinyOpenFoldConfig) -> None:
        super().__init__()
        c = config.c_opm
        self.norms = nn.ModuleDict({"m": nn.LayerNorm(config.c_m)})
        self.linear_a = nn.Linear(config.c_m, c, bias=False)
        self.linear_out = nn.Linear(c * c, config.c_z, bias=False)
        self.axes = (self.along("row", "res"), ReductionAxis("channel", c))

    def context(self, m: Tensor, part: slice = FULL) -> Tensor:
        b: Tensor = self.linear_a(m)
        return b  # [*, s, r, c], needed whole by every piece

    @affine_at_the_end
    def piece(self, m: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        a = rows(self.linear_a, m, part, 1 / m.shape[-3])  # the mean over sequences, in the weights
        c_a, c_b = a.shape[-1], context.shape[-1]
        outer = a.flatten(-2).transpose(-1, -2) @ context.flatten(-2)  # [*, i * c, j * c]
        outer = outer.unflatten(-1, (-1, c_b)).unflatten(-3, (-1, c_a))
        outer = outer.transpose(-2, -3).flatten(-2)  # [*, i, j, c * c]
        return last_columns(self.linear_out, outer, times(part, c_b))


class TinyTriangleMultiplication(Submodule):
    """z_ij += gate * W sum_k (a_ik b_jk) (outgoing) or W sum_k (a_ki b_kj) (incoming), z normalised twice."""

    layout = ALPHAFOLD
    target = "z"
    context_inputs = ("z",)
    piece_inputs = ("z",)
    finish_inputs = ("z",)
    finish_is_affine = False
    context_dims = ("channel", "row", "column")

    def __init__(self, config: TinyOpenFoldConfig, edges: Literal["outgoing", "incoming"]) -> None:
        super().__init__()
        c = config.c_z
        self.outgoing = edges == "outgoing"
        self.norms = nn.ModuleDict({"z": _twice(c)})
        self.linear_a = nn.Linear(c, c, bias=False)
        self.linear_a_gate = nn.Linear(c, c, bias=False)
        self.linear_b = nn.Linear(c, c, bias=False)
        self.linear_b_gate = nn.Linear(c, c, bias=False)
        self.linear_out = nn.Linear(c, c, bias=False)
        self.linear_gate = nn.Linear(c, c, bias=False)
        # As in `TriangleMultiplication`: pieces are rows i (outgoing) or columns j (incoming) of both.
        axis = "row" if self.outgoing else "column"
        self.context_axis = (axis,)
        self.axes = (self.along(axis), ReductionAxis("channel", c, concatenate=True))

    def context(self, z: Tensor, part: slice = FULL) -> Tensor:
        second = (self.linear_b, self.linear_b_gate) if self.outgoing else (self.linear_a, self.linear_a_gate)
        return _operand(z, *second, part)

    def piece(self, z: Tensor, context: Tensor, part: slice = FULL) -> Tensor:
        if self.outgoing:
            product = _operand(z, self.linear_a, self.linear_a_gate, part) @ context.transpose(-1, -2)
        else:
            product = context.transpose(-1, -2) @ _operand(z, self.linear_b, self.linear_b_gate, part)
        return channels_last(product)  # [*, i, j, c]

    def finish(self, update: Tensor, z: Tensor) -> Tensor:
        gate = cheap(torch.sigmoid, self.linear_gate(z))
        out: Tensor = self.linear_out(update)
        return gate * out


def _operand(z: Tensor, linear: nn.Linear, gate_linear: nn.Linear, part: slice) -> Tensor:
    """[*, c, r, r]: one operand of the product, channels first."""
    gate = cheap(torch.sigmoid, rows(gate_linear, z, part))
    operand = cheap(torch.mul, gate, rows(linear, z, part))
    return cheap(channels_first, operand)


class TinyOpenFoldBlock(Block):
    """Nine submodules in the order of the paper; 660,992 parameters at the defaults."""

    def __init__(self, config: TinyOpenFoldConfig) -> None:
        super().__init__()
        self.row_attention = TinyRowAttention(config)
        self.column_attention = TinyAttention(config, "m", "column")
        self.msa_transition = TinyTransition("m", config.c_m, config.transition_factor, "seq")
        self.outer_product_mean = TinyOuterProductMean(config)
        self.triangle_outgoing = TinyTriangleMultiplication(config, "outgoing")
        self.triangle_incoming = TinyTriangleMultiplication(config, "incoming")
        self.triangle_starting = TinyAttention(config, "z", "row")
        self.triangle_ending = TinyAttention(config, "z", "column")
        self.pair_transition = TinyTransition("z", config.c_z, config.transition_factor, "row")
        # The original has it and never calls it. Frozen, so that nobody waits for its gradient.
        self.unused_norm = nn.LayerNorm(config.c_z).requires_grad_(False)


class TinyOpenFoldStack(Plannable):
    """Blocks in sequence over m [*, s, r, c_m] and z [*, r, r, c_z]. Returns z: nobody reads the last m."""

    config: TinyOpenFoldConfig
    outputs = ("z",)

    def __init__(self, config: TinyOpenFoldConfig) -> None:
        super().__init__()
        self.config = TinyOpenFoldConfig.checked(config)
        self.blocks = nn.ModuleList(TinyOpenFoldBlock(config) for _ in range(config.n_block))
        initialise(self)

    def prepare(self, m: Tensor, z: Tensor) -> tuple[State, dict[str, Tensor]]:
        """The state of its chain; there are no constants."""
        return laid_out(m=m, z=z), {}


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Every matrix from a normal distribution of standard deviation 0.02."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)


class TinyOpenFold(nn.Module):
    """Embeds an alignment and features of pairs, runs a stack, and predicts distances.

    `stack` is called as stack(m, z) and returns (z,): a `TinyOpenFoldStack`, or one under a plan.
    """

    def __init__(self, config: TinyOpenFoldConfig, stack: nn.Module | None = None) -> None:
        super().__init__()
        self.config = TinyOpenFoldConfig.checked(config)
        self.msa_embedding = nn.Embedding(config.n_token, config.c_m)
        self.pair_embedding = nn.Linear(config.c_pair_features, config.c_z, bias=False)
        self.distance_head = nn.Linear(config.c_z, 1, bias=False)
        initialise(self)
        self.stack = stack or TinyOpenFoldStack(config)

    def forward(self, tokens: Tensor, pair_features: Tensor, distances: Tensor | None = None) -> Tensor:
        """Predicted distances [b, r, r, 1] in Angstrom; where the true ones are given, the mean square error.

        Args:
            tokens: int64 [b, s, r].
            pair_features: [b, r, r, c_pair_features].
            distances: [b, r, r, 1].
        """
        with region(MSA_EMBEDDING):
            m = self.msa_embedding(tokens)
        with region(PAIR_EMBEDDING):
            # Under autocast a product is in half precision; the residual stream is not.
            z = self.pair_embedding(pair_features).to(m.dtype)
        (z,) = self.stack(m, z)
        with region(HEAD):
            predicted: Tensor = self.distance_head(z).sigmoid() * LARGEST_DISTANCE
        if distances is None:
            return predicted
        with region(LOSS):
            # Not its own mean, which keeps the squares' memory as long as the loss lives.
            return F.mse_loss(predicted.to(distances.dtype), distances, reduction="none").mean()
