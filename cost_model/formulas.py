"""Closed formulas for the memory and the parameters of one Evoformer block, main or extra. Free of torch.

Legend: s sequences, r residues, c_m and c_z channels of m [*, s, r, c_m] and z [*, r, r, c_z]; within a
submodule h heads, c its inner width (of one head, of the outer product's factors, of the triangle product's
operands), t how many times a transition widens. The formulas are leading terms: statistics of
normalisations, masks, pair biases and weights are left out, below 1 % together at the sizes of
AlphaFold 2's main stack, 1.1 % at those of its extra stack, where m is 64 wide.
`python -m evoplan.cost_model.analytic` prints them beside what the traced code holds.

Source: Jumper et al. (2021), Suppl. Alg. 6-15, 18, 19; what is saved follows from the code in `model`.
`notes` are the MagicCube notes' estimates, which this file corrects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from evoplan.model.config import InputShape
from evoplan.model.families import EvoformerConfig


@dataclass(frozen=True)
class Formula:
    """A number of tensor elements.

    Attributes:
        symbol: in the letters of the legend above, for a batch of one; a space multiplies.
        elements: its value, times the batch.
        says: which tensors they are; of an estimate, why it is wrong.
    """

    symbol: str
    elements: Callable[[EvoformerConfig, InputShape], int]
    says: str


@dataclass(frozen=True)
class MemoryFormulas:
    """One submodule, run whole. The state it enters with is not counted.

    Attributes:
        output: the new target.
        saved: held from the end of forward to backward, without the new target.
        forward: live at the peak of a forward that is recorded for backward; `saved` stands for that formula.
        notes: the MagicCube notes' estimate of its peak.
    """

    output: Formula
    saved: Formula
    forward: Formula
    notes: Formula


class Row(NamedTuple):
    """A formula evaluated: whose, which attribute of MemoryFormulas, by symbol, in bytes."""

    name: str
    quantity: str
    symbol: str
    bytes: int


def _evaluated(symbol: str, letters: Mapping[str, int]) -> int:
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", symbol.replace("²", "**2").replace("³", "**3"))
    value: int = eval(product, {"__builtins__": {"max": max}}, letters)  # a literal of this file
    return value


def _formula(symbol: str, says: str, saved: str = "0", **fields: str) -> Formula:
    """The formula of a symbol; `fields` says where the configuration holds its h and c."""

    def elements(config: EvoformerConfig, shape: InputShape) -> int:
        letters = {"s": shape.rows(), "r": shape.n_res, "c_m": config.c_m, "c_z": config.c_z}
        letters |= {"t": config.transition_factor}
        letters |= {letter: getattr(config, field) for letter, field in fields.items()}
        return shape.batch * _evaluated(symbol, letters | {"saved": _evaluated(saved, letters)})

    return Formula(symbol, elements, says)


def _formulas(
    target: str, saved: tuple[str, str], forward: tuple[str, str], notes: tuple[str, str], **fields: str
) -> MemoryFormulas:
    output = {"m": "s r c_m", "z": "r² c_z"}[target], f"the new {target}"
    return MemoryFormulas(
        *(_formula(*line, saved=saved[0], **fields) for line in (output, saved, forward, notes))
    )


_SCORES = (
    "the scores alone: softmax makes a second copy, which stays until backward with all it was made from"
)


_HIDDEN = "right for a widening of 4, but for the hidden layer alone: its input and output are there too"


# Suppl. Alg. 11 and 12.
_TRIANGLE_MULTIPLICATION = _formulas(
    "z",
    saved=(
        "r² (3 c_z + 10 c)",
        "normalised z, the output's projection and its gate; of each operand its gate before and after "
        "masking, its value, and the operand; the product, and the product normalised",
    ),
    forward=("saved + r² c_z", "at the output's gate: one tensor more than is saved"),
    notes=("r² c", "the product alone, one of the thirteen tensors of its size that are saved at c = c_z"),
    c="c_tri",
)


FORMULAS: dict[str, MemoryFormulas] = {
    "row_attention": _formulas(  # Suppl. Alg. 7
        "m",
        saved=(
            "h s r² + s r (c_m + 6 h c) + r² c_z",
            "softmax weights; normalised m; q, k, v, the attended values, the gate, their product; "
            "normalised z, which the bias is made from",
        ),
        forward=(
            "max(2 h s r² + s r (c_m + 2 h c) + r² c_z, saved + s r c_m)",
            "at the softmax: scores and weights; normalised m, q, k; normalised z; or at the output",
        ),
        notes=("h s r²", _SCORES),
        h="n_head_msa",
        c="c_head_msa",
    ),
    "column_attention": _formulas(  # Suppl. Alg. 8
        "m",
        saved=(
            "h s² r + s r (c_m + 6 h c)",
            "softmax weights; transposed normalised m; q, k, v, the attended values, the gate, their product",
        ),
        forward=(
            "max(2 h s² r + s r (2 c_m + 2 h c), saved + 3 s r c_m)",
            "at the softmax: scores and weights; normalised m, as it is and transposed; q, k; or at the "
            "output, which is transposed back: twice that, and normalised m as it is",
        ),
        notes=("h s² r", _SCORES),
        h="n_head_msa",
        c="c_head_msa",
    ),
    "msa_transition": _formulas(  # Suppl. Alg. 9
        "m",
        saved=("(t + 1) s r c_m", "the hidden layer, rectified in place; normalised m"),
        forward=("saved + s r c_m", "what is saved, and the output"),
        notes=("4 s r c_m", _HIDDEN),
    ),
    "outer_product_mean": _formulas(  # Suppl. Alg. 10
        "z",
        saved=(
            "r² c² + s r (c_m + 2 c)",
            "the outer product as its projection reads it; normalised m; both factors",
        ),
        forward=(
            "2 r² c² + s r (c_m + 2 c)",
            "the outer product as it is made and as its projection reads it; normalised m; both factors",
        ),
        notes=("r² c²", "one copy: the change of layout before the projection makes a second"),
        c="c_opm",
    ),
    "triangle_outgoing": _TRIANGLE_MULTIPLICATION,
    "triangle_incoming": _TRIANGLE_MULTIPLICATION,
    "triangle_starting": _formulas(  # Suppl. Alg. 13
        "z",
        saved=(
            "h r³ + r² (c_z + 6 h c)",
            "softmax weights; normalised z; q, k, v, the attended values, the gate, their product",
        ),
        forward=(
            "max(2 h r³ + r² (c_z + 2 h c), saved + r² c_z)",
            "at the softmax: scores and weights; normalised z, q, k; or at the output",
        ),
        notes=("h r³", _SCORES),
        h="n_head_pair",
        c="c_head",
    ),
    "triangle_ending": _formulas(  # Suppl. Alg. 14
        "z",
        saved=(
            "h r³ + r² (2 c_z + 6 h c)",
            "as around the starting node; normalised z transposed twice, for the bias and for q, k, v",
        ),
        forward=(
            "max(2 h r³ + r² (3 c_z + 2 h c), saved + 3 r² c_z)",
            "at the softmax: scores and weights; normalised z, as it is and transposed twice; q, k; or at "
            "the output, which is transposed back: twice that, and normalised z as it is",
        ),
        notes=("h r³", _SCORES),
        h="n_head_pair",
        c="c_head",
    ),
    "pair_transition": _formulas(  # Suppl. Alg. 15
        "z",
        saved=("(t + 1) r² c_z", "the hidden layer, rectified in place; normalised z"),
        forward=("saved + r² c_z", "what is saved, and the output"),
        notes=("4 r² c_z", _HIDDEN),
    ),
}


COLUMN_GLOBAL_ATTENTION = _formulas(  # Suppl. Alg. 19
    "m",
    saved=(
        "s r (c_m + 2 h c + 2 c + h + 1)",
        "normalised m; the gate, and its product with the attended values; k, v; softmax weights; the share "
        "that each sequence has in the mean",
    ),
    forward=("saved + s r c_m", "at the output: what is saved, and the output"),
    notes=("h s² r", "a query per sequence, as in the main stack: here a column has one, and h s r scores"),
    h="n_head_msa",
    c="c_head_msa",
)


def block_formulas(config: EvoformerConfig) -> dict[str, MemoryFormulas]:
    """The formulas of each submodule of a block, in the order in which they run."""
    if config.column_attention == "global":
        return FORMULAS | {"column_attention": COLUMN_GLOBAL_ATTENTION}
    return FORMULAS


BLOCK_OUTPUT = _formula("s r c_m + r² c_z", "the state: what a checkpoint around each block keeps")


SUBMODULE_OUTPUTS = _formula(
    "3 s r c_m + 6 r² c_z", "every new m and z of a block; each is the next one's input"
)


NOTES_SUBMODULE_OUTPUTS = _formula("3 s r c_m + 6 s r² c_z", "s too often: z has no sequences")


def block_saved_elements(config: EvoformerConfig, shape: InputShape) -> int:
    """What one block adds from the end of its forward to its backward, every submodule whole.

    Its outputs are among it, its inputs are not.
    """
    saved = sum(formulas.saved.elements(config, shape) for formulas in block_formulas(config).values())
    return saved + SUBMODULE_OUTPUTS.elements(config, shape)


def analytic_table(config: EvoformerConfig, shape: InputShape, dtype_bytes: int) -> list[Row]:
    """Four rows (output, saved, forward, notes) of each submodule, in the order in which they run.

    Args:
        dtype_bytes: size of one element.
    """
    return [
        Row(name, quantity, formula.symbol, formula.elements(config, shape) * dtype_bytes)
        for name, formulas in block_formulas(config).items()
        for quantity, formula in vars(formulas).items()
    ]


def submodule_parameters(config: EvoformerConfig) -> dict[str, int]:
    """Number of parameters of each submodule of one block."""
    c_m, c_z, opm, tri, t = config.c_m, config.c_z, config.c_opm, config.c_tri, config.transition_factor

    def linear(c_in: int, c_out: int) -> int:
        return (c_in + 1) * c_out

    def attention(c_in: int, heads: int, c_head: int) -> int:
        width = heads * c_head
        return 2 * c_in + 3 * c_in * width + linear(c_in, width) + linear(width, c_in)

    def transition(c: int) -> int:
        return 2 * c + linear(c, t * c) + linear(t * c, c)

    multiplication = 2 * c_z + 4 * linear(c_z, tri) + 2 * tri + linear(tri, c_z) + linear(c_z, c_z)
    triangle_attention = attention(c_z, config.n_head_pair, config.c_head) + c_z * config.n_head_pair

    def global_attention(c_in: int, heads: int, c_head: int) -> int:
        width = heads * c_head
        return 2 * c_in + c_in * width + 2 * c_in * c_head + linear(c_in, width) + linear(width, c_in)

    on_m = c_m, config.n_head_msa, config.c_head_msa
    column_attention = global_attention if config.column_attention == "global" else attention
    return {
        "row_attention": attention(*on_m) + 2 * c_z + c_z * config.n_head_msa,
        "column_attention": column_attention(*on_m),
        "msa_transition": transition(c_m),
        "outer_product_mean": 2 * c_m + 2 * linear(c_m, opm) + linear(opm**2, c_z),
        "triangle_outgoing": multiplication,
        "triangle_incoming": multiplication,
        "triangle_starting": triangle_attention,
        "triangle_ending": triangle_attention,
        "pair_transition": transition(c_z),
    }


def parameter_count(config: EvoformerConfig) -> int:
    """Parameters of one block.

    1,829,952 in AlphaFold 2's main stack, where the notes say less than a million; 701,312 in its extra one.
    """
    return sum(submodule_parameters(config).values())
