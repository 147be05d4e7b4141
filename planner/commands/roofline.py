"""`evoplan roofline`: what bounds each submodule of a model, or one matrix product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from evoplan.planner.commands.flags import files_read, json_option, problem_of, problem_options_without
from evoplan.planner.commands.terminal import console_for_output, progress
from evoplan.planner.files import check_writable, picture_format, write_json

WIDTH = 150
MOST = 10**9  # of one dimension: far beyond any memory
_OF_PRODUCTS = {"dtype", "mixed", "device", "link", "matmul", "split", "plot", "json_path"}


class _Sizes(click.ParamType[tuple[int, int, int]]):
    name = "B,D,F"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int]:
        parts = [part.strip() for part in value.split(",")]
        if len(parts) != 3 or not all(part.isdecimal() and 0 < int(part) <= MOST for part in parts):
            self.fail(
                f"{value!r} are no sizes; write B, D and F of X[B,D] @ Y[D,F] like 512,8192,8192", param, ctx
            )
        b, d, f = map(int, parts)
        return b, d, f


@click.command()
@problem_options_without("host_bytes", "reserve", "optimizer")  # of budgets, of which there is none to keep
@click.option("--every", is_flag=True, help="Print every strategy, not only whole.")
@click.option("--plot", type=click.Path(), help="Draw it here (png, svg or pdf): the roof, points under it.")
@click.option("--matmul", type=_Sizes(), help="Of one product X[B,D] @ Y[D,F], and no model.")
@click.option("--split", type=click.IntRange(2), metavar="N", help="Of --matmul split over D on N devices.")
@json_option
def roofline(
    every: bool,
    plot: str | None,
    matmul: tuple[int, int, int] | None,
    split: int | None,
    json_path: str | None,
    **flags: Any,
) -> None:
    """What bounds each submodule on a device: FLOPs, bytes, kernels, intensity, lower and upper times.

    With --matmul one product: whether arithmetic or memory bounds it, and from which batch B on arithmetic.
    """
    check_writable(plot, json_path=json_path, reads=files_read(**flags))
    if plot is not None:
        picture_format(plot)
    if matmul is not None:
        _of_product(matmul, split, plot, json_path, flags)
        return
    if split is not None:
        raise ValueError("--split is of one product; add --matmul B,D,F, or for a model give --ranks")
    problem = problem_of(**flags)
    from evoplan.planner.plans.roofline import roofline
    from evoplan.planner.problems.costing import cost_problem
    from evoplan.planner.reports.roofline import print_roofline, roofline_to_json
    from evoplan.planner.reports.tables import describe_problem

    with progress("tracing") as update:
        costed = cost_problem(problem, progress=lambda name: update(f"tracing {name}"))
    rows = roofline(costed)
    # A discarding run of whole does what its forward does, where it has one.
    left_out = "discard" if problem.training else None
    shown = [row for row in rows if every or (str(row.strategy) == "whole" and row.phase != left_out)]
    if json_path:
        write_json(json_path, roofline_to_json(rows, costed))
    if plot:
        from evoplan.planner.reports.plot_roofline import plot_roofline, points_of

        title = describe_problem(problem)
        plot_roofline(points_of(shown), costed.device, problem.precision, title, plot)
    console = console_for_output(WIDTH, json_path)
    print_roofline(shown, costed, console)
    if plot:
        console.print(f"picture written to {plot}", highlight=False, soft_wrap=True)


def _of_product(
    sizes: tuple[int, int, int],
    devices: int | None,
    plot: str | None,
    json_path: str | None,
    flags: dict[str, Any],
) -> None:
    """One matrix product, alone and split."""
    context = click.get_current_context()
    for param in context.command.params:
        given = context.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if given and param.name not in _OF_PRODUCTS:
            raise ValueError(f"--matmul is one product, of no model; leave {param.opts[0]} out")
    problem = problem_of(**flags)
    from evoplan.cost_model.devices import DTYPES, link_of
    from evoplan.cost_model.matmul import Matmul
    from evoplan.cost_model.matmul import split as split_over
    from evoplan.planner.problems.costing import device_of
    from evoplan.planner.reports.matmul import matmul_to_json, print_matmul, print_split

    device, dtype = device_of(problem), problem.autocast or problem.dtype
    product = Matmul(*sizes, DTYPES[dtype])
    found = link = None
    if devices is not None:
        link = link_of(device, devices)
        if flags["link"] is not None:
            link = replace(link, bandwidth=flags["link"])
        found = split_over(product, devices, device, dtype, link)
    if json_path:
        write_json(json_path, matmul_to_json(product, device, dtype, found, link))
    if plot:
        from evoplan.planner.reports.plot_roofline import Point, plot_roofline

        name = f"[{product.b}, {product.d}] @ [{product.d}, {product.f}]"
        plot_roofline([Point(name, product.bounds(device, dtype))], device, dtype, "one product", plot)
    console = console_for_output(json_path=json_path)
    print_matmul(product, device, dtype, console)
    if found is not None and link is not None:
        print_split(product, found, link, console)
    if plot:
        console.print(f"picture written to {plot}", highlight=False, soft_wrap=True)
