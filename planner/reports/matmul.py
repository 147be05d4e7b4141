"""The roofline of one matrix product, in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from evoplan.cost_model.devices import Device, Link
from evoplan.cost_model.matmul import Matmul, Split
from evoplan.cost_model.roofline import balance
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import format_rate, format_seconds, format_size


def print_matmul(product: Matmul, device: Device, dtype: str, console: Console) -> None:
    """Its intensity on the device, what bounds it, and from which batch on arithmetic does."""
    found, edge = product.bounds(device, dtype), balance(device, dtype)
    _say(console, f"X[{product.b}, {product.d}] @ Y[{product.d}, {product.f}] in {dtype} on {device.name}")
    table = new_table("", "GFLOP", "moved", "FLOP/B", "math", "memory", "bound")
    table.add_row(
        f"{product.flops / 1e9:,.4g}",
        format_size(product.bytes),
        f"{product.intensity:.4g}",
        format_seconds(found.math_seconds),
        format_seconds(found.memory_seconds),
        found.bound,
    )
    print_table(table, console, keys=0)
    _say(
        console,
        f"{device.name}: {format_rate(device.peak_flops[dtype])} in {dtype}, "
        f"{format_rate(device.bandwidth, 'B/s')}, so bound by arithmetic from {edge:.4g} FLOP/B on "
        f"({device.source})",
    )
    least = product.least_batch(device, dtype)
    sizes = f"D = {product.d}, F = {product.f}"
    if least is None:
        _say(console, f"with {sizes} it is bound by memory at any batch B: D or F is too small")
    else:
        _say(
            console,
            f"with {sizes} it is bound by arithmetic from B = {least} on "
            f"(B = {product.element_bytes * edge / 2:.0f} where D and F are large)",
        )


def print_split(product: Matmul, found: Split, link: Link, console: Console) -> None:
    """The same split over D on several devices."""
    _say(
        console,
        f"\nsplit over D on {found.devices} devices, {format_rate(link.bandwidth, 'B/s')} each way between "
        "them: each multiplies its part, a ring sums the partial results",
    )
    table = new_table("", "math", "communication", "lower", "upper", "one device", "bound")
    times = (
        found.math_seconds,
        found.comms_seconds,
        found.lower_seconds,
        found.upper_seconds,
        found.whole_seconds,
    )
    table.add_row(*map(format_seconds, times), found.bound)
    print_table(table, console, keys=0)
    _say(
        console,
        f"with B = {product.b}, F = {product.f} arithmetic takes longer than communication from "
        f"D = {found.least_d} on",
    )
    _say(console, "lower: the two overlap; upper: they do not; sums of partial results count no arithmetic")


def matmul_to_json(
    product: Matmul, device: Device, dtype: str, found: Split | None, link: Link | None
) -> dict[str, Any]:
    """All of it as plain types."""
    alone = product.bounds(device, dtype)
    return {
        "b": product.b, "d": product.d, "f": product.f, "dtype": dtype, "device": device.name,
        "flops": product.flops, "bytes": product.bytes, "intensity": product.intensity,
        "balance": balance(device, dtype), "bound": alone.bound,
        "math_seconds": alone.math_seconds, "memory_seconds": alone.memory_seconds,
        "least_batch": product.least_batch(device, dtype),
        "split": None if found is None else {
            **asdict(found), "bound": found.bound, "link": link and asdict(link),
            "lower_seconds": found.lower_seconds, "upper_seconds": found.upper_seconds,
        },
    }  # fmt: skip


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False)
