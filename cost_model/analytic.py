"""The closed formulas of `cost_model.formulas`, printed beside what the traced code holds.

python -m evoplan.cost_model.analytic [--model NAME] [--seq S] [--res R] [--dtype NAME]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

from evoplan.cost_model.formulas import (
    BLOCK_OUTPUT,
    FORMULAS,
    NOTES_SUBMODULE_OUTPUTS,
    SUBMODULE_OUTPUTS,
    Formula,
    block_formulas,
    parameter_count,
)
from evoplan.model.config import InputShape, override
from evoplan.model.families import PRESETS, EvoformerConfig
from evoplan.model.families.evoformer import EVOFORMER


def _traced(config: EvoformerConfig, shape: InputShape, dtype: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Bytes each submodule saves and its forward peak, and what the block holds: run without data."""
    import torch

    from evoplan.cost_model.fakes import fake_copy
    from evoplan.cost_model.simulation import simulated
    from evoplan.model import Chain, EvoformerStack
    from evoplan.model.modules.evoformer import mask_constants
    from evoplan.model.running.execution import record
    from evoplan.model.running.kinds import WHOLE

    with torch.device("meta"):
        stack = EvoformerStack(replace(config, n_block=1))
    traced, runs = {}, []
    with simulated() as trace:
        make = partial(torch.empty, dtype=getattr(torch, dtype))
        steps = Chain.of(fake_copy(stack, getattr(torch, dtype))).steps
        m = make(shape.batch, shape.rows(), shape.n_res, config.c_m)
        z = make(shape.batch, shape.n_res, shape.n_res, config.c_z)
        entry, constants = {"m": m, "z": z}, mask_constants(m, z)
        state, at_entry = dict(entry), trace.live_bytes
        for name, step in zip(FORMULAS, steps, strict=True):
            before = trace.live_bytes
            trace.reset()
            run, output = record(step.submodule, WHOLE, step.tensors(state, constants, 0))
            runs.append(run)
            traced[name] = trace.live_bytes - before - output.nbytes, trace.peak_bytes - before
            state[step.target] = output
        return traced, trace.live_bytes - at_entry


def main(arguments: list[str] | None = None) -> None:
    """Print the formulas, and their values beside the trace of one block of a preset."""
    from rich.console import Console
    from rich.table import Table

    from evoplan.cost_model.devices import DTYPES

    stacks = list(EVOFORMER.presets)
    parser = argparse.ArgumentParser(prog="python -m evoplan.cost_model.analytic", description=main.__doc__)
    parser.add_argument(
        "--model", choices=stacks, default="alphafold2-finetune", help="(default: %(default)s)"
    )
    parser.add_argument("--seq", type=int, help="sequences, s; else the preset's own")
    parser.add_argument("--res", type=int, help="residues, r; else the preset's own")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    config = PRESETS[options.model].config
    assert isinstance(config, EvoformerConfig)  # the choices are its family's
    formulas = block_formulas(config)
    try:
        shape = override(PRESETS[options.model].shape, n_seq=options.seq, n_res=options.res)
    except ValueError as error:
        parser.error(str(error))
    item = DTYPES[options.dtype]
    traced, block = _traced(config, shape, options.dtype)

    symbols = Table("submodule", "notes", "saved", "forward peak", title="Elements, by symbol")
    numbers = Table("submodule", title=f"MiB at s = {shape.n_seq}, r = {shape.n_res}, {options.dtype}")
    for header in ("notes", "saved", "traced", "forward peak", "traced"):
        numbers.add_column(header, justify="right")

    def add(name: str, *sizes: Any) -> None:
        numbers.add_row(name, *("" if size is None else f"{size / 2**20:,.1f}" for size in sizes))

    def size(formula: Formula) -> int:
        return formula.elements(config, shape) * item

    for name, of in formulas.items():
        symbols.add_row(name, of.notes.symbol, of.saved.symbol, of.forward.symbol)
        add(name, size(of.notes), size(of.saved), traced[name][0], size(of.forward), traced[name][1])
    numbers.add_section()
    saved = sum(size(of.saved) for of in formulas.values())
    add("sum", sum(size(of.notes) for of in formulas.values()), saved, sum(x for x, _ in traced.values()))
    outputs = size(SUBMODULE_OUTPUTS)
    add("outputs", size(NOTES_SUBMODULE_OUTPUTS), outputs, block - sum(x for x, _ in traced.values()))
    add("block", None, saved + outputs, block)
    console = Console()
    console.print(symbols, numbers)
    console.print(f"Output of one block: {size(BLOCK_OUTPUT) / 2**20:,.1f} MiB.", end=" ")
    console.print(f"Parameters of one block: {parameter_count(config):,}.", highlight=False)


if __name__ == "__main__":
    main()
