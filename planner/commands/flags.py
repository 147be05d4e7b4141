"""The flags that describe a problem, and the problem that they describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from evoplan.cost_model.devices import DEVICES, DTYPES
from evoplan.cost_model.static import OPTIMIZER_STATES
from evoplan.model.config import InputShape, override
from evoplan.model.families import PRESETS, preset
from evoplan.planner.sizes import parse_size

if TYPE_CHECKING:
    from evoplan.planner.problems.problem import Problem


Command = TypeVar("Command", bound=Callable[..., Any])
_MODES = ["training", "inference"]


AUTO = 0  # --ranks auto

# Far more than anybody waits for; beyond that it is a slip.
STEPS = click.IntRange(1, 10_000_000)
REPEATS = click.IntRange(1, 10_000)

cache_option = click.option("--cache", type=click.Path(), help="File of measured times; else EVOPLAN_CACHE.")
times_option = click.option(
    "--times",
    type=click.Choice(["auto", "measured", "calibrated", "roofline"]),
    default="auto",
    show_default=True,
    help="Where step times come from; auto: the best there is.",
)
JSON_HELP = "Also write the result as JSON; -: to standard output, words to standard error."
json_option = click.option("--json", "json_path", type=click.Path(), help=JSON_HELP)


class Size(click.ParamType[int]):
    name = "SIZE"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value, self.least)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Number(click.FloatRange):
    """A number within a range; nan, which every comparison lets through, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number; give one {self._describe_range()}", param, ctx)
        return number


class _Dropout(click.ParamType[float]):
    name = "P|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            rate = 0.0 if value == "off" else float(value)
        except ValueError:
            rate = -1.0
        if not 0 <= rate < 1:
            self.fail(f"{value!r} is not a dropout rate; write off or a number from 0 to below 1", param, ctx)
        return rate


class _Ranks(click.ParamType[int]):
    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "auto" or isinstance(value, int):
            return AUTO if value == "auto" else value
        try:
            ranks = int(value)
        except ValueError:
            ranks = 0
        if ranks < 1:
            self.fail(f"{value!r} is no number of ranks; write a whole number from 1, or auto", param, ctx)
        return ranks


_PROBLEM_OPTIONS = [
    click.option("--model", default="alphafold2", show_default=True, help=f"Preset: {', '.join(PRESETS)}."),
    click.option("--n-blocks", type=click.IntRange(1), help="Blocks of the stack."),
    click.option("--n-seq", type=click.IntRange(1), help="Rows s of the alignment."),
    click.option("--n-res", type=click.IntRange(1), help="Residues r."),
    click.option("--n-extra", type=click.IntRange(1), help="Rows of the extra alignment, for a trunk."),
    click.option("--c-m", type=click.IntRange(1), help="Channels of the MSA representation."),
    click.option("--c-z", type=click.IntRange(1), help="Channels of the pair representation."),
    click.option("--c-s", type=click.IntRange(1), help="Channels of the single representation."),
    click.option("--batch", type=click.IntRange(1), help="Alignments per step."),
    click.option("--msa", type=click.Path(), help="Take r, and s up to --n-seq, from this alignment."),
    click.option("--skip-bad", is_flag=True, help="Leave out the bad sequences of --msa, and say how many."),
    click.option("--dtype", default="float32", show_default=True, help=f"One of {', '.join(DTYPES)}."),
    click.option(
        "--precision", "mixed", type=click.Choice(["bf16-mixed", "fp16-mixed"]),
        help="Parameters in float32, products in half precision (torch.autocast); else all in --dtype.",
    ),
    click.option("--mode", type=click.Choice(_MODES), default=_MODES[0], show_default=True),
    click.option("--dropout", type=_Dropout(), help="One rate everywhere, or off; else the preset's own."),
    click.option(
        "--optimizer", type=click.Choice(list(OPTIMIZER_STATES)), default="adamw", show_default=True,
        help="Its states count.",
    ),
    click.option(
        "--device", default="cpu", show_default=True,
        help=f"cuda, a device file, or one of {', '.join(DEVICES)}.",
    ),
    click.option("--memory", type=Size(), help="Budget, like 16GiB; else the device's memory."),
    click.option(
        "--host-memory", "host_bytes", type=Size(),
        help="Of the host's memory, in which what training keeps may wait for backward.",
    ),
    click.option(
        "--reserve", type=Size(least=0), default=0,
        help="Of the budget, kept free for what is not in the plan: heads, losses.",
    ),
    click.option(
        "--ranks", type=_Ranks(), default=1, show_default=True,
        help="Devices that share each input; auto: as few as the budget needs.",
    ),
    click.option("--link", type=Size(), help="Between ranks, each way, per second; else the device's."),
]  # fmt: skip


def problem_options(command: Command) -> Command:
    for option in reversed(_PROBLEM_OPTIONS):
        command = option(command)
    return command


def problem_options_without(*names: str) -> Callable[[Command], Command]:
    """Those that say something to a command, for which the others would be ignored."""

    def few(command: Command) -> Command:
        command = problem_options(command)
        params: list[click.Parameter] = command.__click_params__  # type: ignore[attr-defined]
        params[:] = [param for param in params if param.name not in names]
        return command

    return few


def problem_of(
    model: str,
    n_blocks: int | None,
    n_seq: int | None,
    n_res: int | None,
    n_extra: int | None,
    c_m: int | None,
    c_z: int | None,
    c_s: int | None,
    batch: int | None,
    msa: str | None,
    skip_bad: bool,
    dropout: float | None,
    device: str,
    memory: int | None,
    ranks: int,
    link: int | None,
    reserve: int = 0,
    **rest: Any,
) -> Problem:
    """The problem that the flags describe."""
    chosen = preset(model)
    config = chosen.config.resized(n_block=n_blocks, c_m=c_m, c_z=c_z, c_s=c_s)
    if dropout is not None:
        config = config.with_dropout(dropout)
    shape: InputShape = chosen.shape
    if n_extra is not None and shape.n_extra is None:
        raise ValueError(f"--n-extra: {model} has no extra stack; use --model alphafold2-trunk")
    if n_seq is not None and shape.n_seq is None:
        raise ValueError(f"--n-seq: {model} reads no alignment; leave it out")
    check_skip_bad(msa, skip_bad)
    if msa is not None:
        from evoplan.planner.problems.problem import shape_for_alignment

        shape = shape_for_alignment(shape, msa, n_seq, n_extra, skip_bad, say)
        n_seq = n_extra = None  # limits, which the shape keeps
    shape = override(shape, n_seq=n_seq, n_res=n_res, batch=batch, n_extra=n_extra)
    from evoplan.planner.problems.device_file import own_device as device_of_file

    own_device = device_of_file(device)
    if own_device is not None:
        device = own_device.name
    elif device not in (*DEVICES, "cuda"):
        raise ValueError(
            f"unknown device {device!r}; choose one of: {', '.join(DEVICES)}, cuda, or a .json file"
        )
    known = own_device or DEVICES.get(device)
    if ranks == AUTO:
        raise ValueError("--ranks auto is for plan; give a number")
    from evoplan.planner.problems.problem import Problem

    if memory is None and known is not None:
        memory = known.memory_bytes
    return Problem(
        model=model, config=config, shape=shape, device=device, budget_bytes=memory, ranks=ranks,
        link=None if link is None else replace((known or DEVICES["cpu"]).link, bandwidth=link),
        own_device=own_device, reserve_bytes=reserve,
        **rest,
    )  # fmt: skip


def check_skip_bad(msa: str | None, skip_bad: bool) -> None:
    """Refuse --skip-bad where there is no file whose sequences could be bad."""
    if skip_bad and msa is None:
        raise ValueError("--skip-bad is about an alignment's sequences; add --msa FILE, or leave it out")


def say(text: str) -> None:
    """Tell the user something that is no result: on standard error."""
    click.echo(text, err=True)


def files_read(
    cache: str | None = None,
    msa: str | None = None,
    device: str = "",
    source: str | None = None,
    **_: Any,
) -> list[str | None]:
    """Files that a command with these flags reads, and so must not write over.

    Args:
        source: FILE.py:FUNCTION, of --from.
    """
    return [cache, msa, device if device.endswith(".json") else None, (source or "").rpartition(":")[0]]
