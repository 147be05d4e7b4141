"""What AlphaFold's submodules read: representations, and the masks of their positions."""

from __future__ import annotations

from evoplan.model.running.submodule import Layout

ALPHAFOLD = Layout(
    state={
        "m": ("seq", "res", "c_m"),
        "s": ("res", "c_s"),
        "z": ("row", "column", "c_z"),
    },
    constants={
        "msa_mask": ("seq", "res"),
        "pair_mask": ("row", "column"),
        "pair_count": ("row", "column"),
        "single_mask": ("key",),  # of those that are attended to: nobody reads it at a position of its own
    },
)
