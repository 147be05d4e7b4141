"""Sizes of the models and of their inputs. Free of torch, so the command line can read it at no cost.

Legend, used throughout: s = n_seq (rows of the alignment), r = n_res (residues),
c_m = channels of the MSA representation m [*, s, r, c_m],
c_z = channels of the pair representation z [*, r, r, c_z].
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

ColumnAttention = Literal["gated", "global"]


def _require_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


@dataclass(frozen=True)
class EvoformerConfig:
    """Widths of an Evoformer stack; the defaults are AlphaFold 2's main stack.

    Its columns attend gated (Alg. 8); those of the extra MSA stack attend globally (Alg. 19).

    Source: Jumper et al. (2021), Suppl. Alg. 6-15, 18, 19 and 1.6.
    """

    n_block: int = 48
    c_m: int = 256
    c_z: int = 128
    n_head_msa: int = 8
    n_head_pair: int = 4
    c_head: int = 32  # width of one attention head on z
    c_opm: int = 32  # outer product mean
    c_tri: int = 128  # triangle multiplication
    transition_factor: int = 4
    dropout_msa: float = 0.15
    dropout_pair: float = 0.25
    c_head_msa: int = 32  # width of one attention head on m
    column_attention: ColumnAttention = "gated"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("dropout"):
                if not 0.0 <= value < 1.0:
                    raise ValueError(f"{field.name} must be at least 0 and below 1, not {value!r}")
            elif field.name == "column_attention":
                if value not in get_args(ColumnAttention):
                    choices = " or ".join(map(repr, get_args(ColumnAttention)))
                    raise ValueError(f"column_attention must be {choices}, not {value!r}")
            else:
                _require_positive(**{field.name: value})

    masks = {"msa_mask": "m", "pair_mask": "z"}  # each mask, and the tensor whose positions it marks

    def with_dropout(self, rate: float) -> EvoformerConfig:
        """The same model with one dropout rate everywhere; 0 turns it off."""
        return replace(self, dropout_msa=rate, dropout_pair=rate)

    def state_shapes(self, shape: InputShape) -> dict[str, tuple[int, ...]]:
        """Shapes of m and z, the batch first."""
        return {
            "m": (shape.batch, shape.n_seq, shape.n_res, self.c_m),
            "z": (shape.batch, shape.n_res, shape.n_res, self.c_z),
        }


@dataclass(frozen=True)
class TrunkConfig:
    """An extra MSA stack on (e, z), then the main stack on (m, z).

    Source: Jumper et al. (2021), Suppl. Alg. 2, lines 15-17.
    """

    extra: EvoformerConfig
    main: EvoformerConfig

    def __post_init__(self) -> None:
        if self.extra.c_z != self.main.c_z:
            raise ValueError(
                f"the stacks share z, but c_z is {self.extra.c_z} in one, {self.main.c_z} in the other"
            )

    masks = {"extra_mask": "e", "msa_mask": "m", "pair_mask": "z"}

    @property
    def n_block(self) -> int:
        """Blocks of both stacks."""
        return self.extra.n_block + self.main.n_block

    def with_dropout(self, rate: float) -> TrunkConfig:
        """The same model with one dropout rate everywhere; 0 turns it off."""
        return TrunkConfig(self.extra.with_dropout(rate), self.main.with_dropout(rate))

    def state_shapes(self, shape: InputShape) -> dict[str, tuple[int, ...]]:
        """Shapes of e, m and z, the batch first."""
        if shape.n_extra is None:
            raise ValueError("a trunk needs the rows of its extra alignment; give --n-extra")
        e = shape.batch, shape.n_extra, shape.n_res, self.extra.c_m
        return {"e": e, **self.main.state_shapes(shape)}


@dataclass(frozen=True)
class TinyOpenFoldConfig:
    """Widths of TinyOpenFold; the defaults are the original's, with 2,653,760 parameters.

    Its heads share the width of their stream, and it drops nothing.

    Source: AMD's HPCTrainingExamples, TinyOpenFold, version 1.
    """

    n_block: int = 4
    c_m: int = 64
    c_z: int = 128
    n_head_msa: int = 4
    n_head_pair: int = 4
    c_opm: int = 32
    transition_factor: int = 4
    n_token: int = 21  # 20 amino acids, and unknown
    c_pair_features: int = 65

    def __post_init__(self) -> None:
        _require_positive(**vars(self))
        for what, c, heads in (("c_m", self.c_m, self.n_head_msa), ("c_z", self.c_z, self.n_head_pair)):
            if c % heads:
                raise ValueError(f"{what} = {c} is no multiple of its {heads} heads; choose one that is")

    masks: ClassVar[dict[str, str]] = {}

    @property
    def c_head_msa(self) -> int:
        """Width of one head on m."""
        return self.c_m // self.n_head_msa

    @property
    def c_head(self) -> int:
        """Width of one head on z."""
        return self.c_z // self.n_head_pair

    @property
    def c_tri(self) -> int:
        """Width of the triangle products' operands."""
        return self.c_z

    def with_dropout(self, rate: float) -> TinyOpenFoldConfig:
        """The same model: without dropout is what it is."""
        if rate:
            raise ValueError("TinyOpenFold drops nothing; leave --dropout out")
        return self

    def state_shapes(self, shape: InputShape) -> dict[str, tuple[int, ...]]:
        """Shapes of m and z, the batch first."""
        return {
            "m": (shape.batch, shape.n_seq, shape.n_res, self.c_m),
            "z": (shape.batch, shape.n_res, shape.n_res, self.c_z),
        }


# What TinyOpenFold is trained on (`model.tiny_data`).
Task = Literal["random", "distance"]
TASKS: tuple[Task, ...] = get_args(Task)

ModelConfig = EvoformerConfig | TrunkConfig | TinyOpenFoldConfig


def with_blocks(config: ModelConfig, n_block: int) -> ModelConfig:
    """The model's first blocks; the main stack keeps at least one."""
    if not isinstance(config, TrunkConfig):
        return replace(config, n_block=n_block)
    left = n_block - config.extra.n_block
    if left < 1:
        raise ValueError(
            f"{n_block} blocks: at least {config.extra.n_block + 1}, one of the main stack included"
        )
    return replace(config, main=replace(config.main, n_block=left))


@dataclass(frozen=True)
class InputShape:
    """Shape of one step's input: `batch` alignments of `n_seq` rows and `n_res` columns.

    `n_extra` is the number of rows of the extra alignment, where the model has a stack for it.
    """

    n_seq: int
    n_res: int
    batch: int = 1
    n_extra: int | None = None

    def __post_init__(self) -> None:
        _require_positive(n_seq=self.n_seq, n_res=self.n_res, batch=self.batch)
        if self.n_extra is not None:
            _require_positive(n_extra=self.n_extra)


@dataclass(frozen=True)
class Preset:
    """A named model with the input shape it is usually trained on."""

    config: ModelConfig
    shape: InputShape
    says: str


_EXTRA = EvoformerConfig(n_block=4, c_m=64, c_head_msa=8, column_attention="global")

PRESETS: dict[str, Preset] = {
    "alphafold2": Preset(
        EvoformerConfig(), InputShape(128, 256), "main stack, initial training crop (Suppl. 1.11)"
    ),
    "alphafold2-finetune": Preset(
        EvoformerConfig(), InputShape(512, 384), "main stack, fine-tuning crop (Suppl. 1.11)"
    ),
    "alphafold2-t1044": Preset(
        EvoformerConfig(),
        InputShape(128, 2048),
        "main stack, inference on a protein as long as CASP14's T1044",
    ),
    "alphafold2-extra": Preset(
        _EXTRA, InputShape(1024, 256), "extra MSA stack, initial training crop (Suppl. Alg. 18, 1.11)"
    ),
    "alphafold2-extra-finetune": Preset(
        _EXTRA, InputShape(5120, 384), "extra MSA stack, fine-tuning crop (Suppl. Alg. 18, 1.11)"
    ),
    "alphafold2-trunk": Preset(
        TrunkConfig(_EXTRA, EvoformerConfig()),
        InputShape(128, 256, n_extra=1024),
        "extra MSA stack, then main stack, initial training crop (Suppl. Alg. 2, 1.11)",
    ),
    "alphafold2-trunk-finetune": Preset(
        TrunkConfig(_EXTRA, EvoformerConfig()),
        InputShape(512, 384, n_extra=5120),
        "extra MSA stack, then main stack, fine-tuning crop (Suppl. Alg. 2, 1.11)",
    ),
    "alphafold2-narrow": Preset(
        EvoformerConfig(n_block=4, c_m=64, c_z=64),
        InputShape(32, 64),
        "4 blocks, c_m = c_z = 64, AlphaFold 2's heads and widths; trains on a laptop",
    ),
    "tiny-openfold": Preset(
        TinyOpenFoldConfig(), InputShape(16, 64, batch=4), "the stack of TinyOpenFold at its defaults"
    ),
}


def preset(name: str) -> Preset:
    """Look a preset up; raises ValueError that lists the names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown model {name!r}; choose one of: {', '.join(PRESETS)}") from None


def override(base: Any, **changes: Any) -> Any:
    """Copy of a frozen dataclass with the changes that are not None."""
    return replace(base, **{name: value for name, value in changes.items() if value is not None})
