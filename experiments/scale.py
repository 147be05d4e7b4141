"""Training on 1 to 512 devices, on paper: data parallelism times dynamic axial parallelism.

    python -m evoplan.experiments.scale
    python -m evoplan.experiments.scale --cluster cluster.json --model alphafold2-trunk-finetune --batch 128

One rank of each imagined group is traced and planned for the memory of a device. The cluster is described
by a JSON file such as

    {"device": "a100-40gb", "memory": "38GiB", "devices_per_node": 8,
     "node_link": {"bandwidth": "300GB", "latency": 2e-6}, "network": {"bandwidth": "25GB", "latency": 5e-6}}

of which all but the device may be left out. Times are lower bounds: the roofline of every kernel, the
bandwidth of every link, nothing overlapped, and gradients summed once for a global batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
from matplotlib.figure import Figure
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from evoplan.cost_model.devices import DEVICES, NETWORK, PER_NODE, Link
from evoplan.cost_model.roofline import reduction_seconds
from evoplan.model.families import PRESETS, preset
from evoplan.planner.commands.terminal import console_for_output, run_command
from evoplan.planner.files import check_writable, picture_format, write_json
from evoplan.planner.plans.planning import NoPlanError, solve
from evoplan.planner.problems.costing import cost_problem
from evoplan.planner.problems.problem import Problem
from evoplan.planner.reports.labels import Label, place_labels
from evoplan.planner.reports.plot import BY_HAND, PLANNED, plt, save_figure
from evoplan.planner.reports.tables import new_table, print_table
from evoplan.planner.sizes import format_seconds, format_size, parse_size
from evoplan.planner.solvers import Frontier

RESULTS = Path(__file__).parent / "results" / "scale.json"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "scale.png"
LEAST = "tab:green"
Size = Annotated[int, BeforeValidator(parse_size)]


class LinkDescription(BaseModel):
    """Bytes per second each way, such as 25GB, and seconds."""

    model_config = ConfigDict(extra="forbid")

    bandwidth: Size
    latency: float = Field(ge=0, allow_inf_nan=False)


class Cluster(BaseModel):
    """What the training runs on."""

    model_config = ConfigDict(extra="forbid")

    device: str = "a100-40gb"
    memory: Size | None = None
    devices_per_node: int = Field(default=PER_NODE, ge=1)
    node_link: LinkDescription | None = None
    network: LinkDescription = LinkDescription(bandwidth=int(NETWORK.bandwidth), latency=NETWORK.latency)

    def link(self, devices: int) -> Link:
        """What so many devices talk over: their node's link, or the network."""
        if devices > self.devices_per_node:
            return Link(self.network.bandwidth, self.network.latency)
        if self.node_link is None:
            return DEVICES[self.device].link
        return Link(self.node_link.bandwidth, self.node_link.latency)


@dataclass(frozen=True)
class Share:
    """One input on some ranks, planned.

    Attributes:
        least_bytes: what the leanest plan needs; large_bytes: recomputing every block as a whole.
        seconds: of one input's forward and backward.
        gradient_bytes: what is summed once for a batch.
    """

    ranks: int
    peak_bytes: int
    least_bytes: int
    large_bytes: int
    seconds: float
    gradient_bytes: int


def planned_share(problem: Problem) -> Share | None:
    """The plan for one rank's share; None where nothing fits."""
    costed = cost_problem(problem)
    try:
        plan = solve(costed)
    except NoPlanError:
        return None
    return Share(
        problem.ranks,
        plan.predicted.peak_bytes,
        costed.fixed_bytes + Frontier(costed.table).least_replay.peak_bytes,
        plan.baselines["large"].peak_bytes,
        plan.predicted.step_seconds - costed.reduction_seconds,
        costed.static["gradients"],
    )


def row(devices: int, share: Share, batch: int, cluster: Cluster) -> dict[str, Any]:
    """A step of one batch on so many devices, as many replicas as there are."""
    replicas = devices // share.ranks
    inputs = -(-batch // replicas)  # of the busiest replica, one after the other
    reduction = reduction_seconds(share.gradient_bytes, devices, cluster.link(devices))
    return {
        "devices": devices,
        "replicas": replicas,
        "ranks": share.ranks,
        "step_seconds": inputs * share.seconds + reduction,
        "reduction_seconds": reduction,
        "peak_bytes": share.peak_bytes,
        "least_bytes": share.least_bytes,
        "large_bytes": share.large_bytes,
    }


def study(cluster: Cluster, shares: list[Share], batch: int, most: int) -> list[dict[str, Any]]:
    """The fastest division of 1, 2, 4, ... devices, and its efficiency beside the fewest that are enough."""
    best: list[dict[str, Any]] = []
    for devices in (2**power for power in range(most.bit_length())):
        rows = [
            row(devices, share, batch, cluster)
            for share in shares
            if devices % share.ranks == 0 and devices // share.ranks <= batch
        ]
        if rows:
            best.append(min(rows, key=lambda found: found["step_seconds"]))
    if best:
        work = best[0]["devices"] * best[0]["step_seconds"]
        best = [found | {"efficiency": work / (found["devices"] * found["step_seconds"])} for found in best]
    return best


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """Step time and memory of a device over the number of devices; a colour is one thing in both panels."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    devices = [found["devices"] for found in rows]
    seconds = [found["step_seconds"] for found in rows]
    upper.loglog(devices, seconds, "o-", color=PLANNED, label="planned")
    linear = [seconds[0] * devices[0] / n for n in devices]
    upper.loglog(devices, linear, ":", color="0.5", label="linear")
    upper.set(title=title, ylabel="seconds per batch")
    upper.margins(y=0.15)
    upper.legend(title="replicas x ranks")
    for name, style, color in (
        ("large", "^--", BY_HAND),
        ("planned", "o-", PLANNED),
        ("least", "v--", LEAST),
    ):
        key = "peak_bytes" if name == "planned" else f"{name}_bytes"
        lower.semilogx(devices, [found[key] / 2**30 for found in rows], style, color=color, label=name)
    lower.set(xlabel="devices", ylabel="GiB per device", ylim=(0, None))
    lower.set_xticks(devices, [str(n) for n in devices])
    lower.minorticks_off()
    lower.legend()
    labels = [
        Label(f"{found['replicas']} x {found['ranks']}", found["devices"], found["step_seconds"])
        for found in rows
    ]
    place_labels(upper, labels, size=7)
    return figure


def read_cluster(path: str | None) -> Cluster:
    """A cluster from its description; ValueError says what is wrong with it."""
    if path is None:
        return Cluster()
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        cluster = Cluster.model_validate(document)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}: not JSON; see `python -m evoplan.experiments.scale --help`") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the description"
        raise ValueError(f"{path}: {where}: {first['msg']}") from None
    if cluster.device not in DEVICES:
        raise ValueError(f"{path}: unknown device {cluster.device!r}; choose one of: {', '.join(DEVICES)}")
    return cluster


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--cluster", "cluster_path", type=click.Path(), help="JSON; else nodes of 8 A100 40 GB.")
@click.option("--model", type=click.Choice(list(PRESETS)), default="alphafold2-finetune", show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="bfloat16", show_default=True
)
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000_000),
    default=128,
    show_default=True,
    help="Inputs of a global batch.",
)
@click.option("--most", type=click.IntRange(1, 65536), default=512, show_default=True, help="Devices.")
@click.option(
    "--most-ranks", type=click.IntRange(1, 64), default=8, show_default=True, help="That share one input."
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(),
    default=str(RESULTS),
    show_default="experiments/results/",
    help="Where the result goes; -: to standard output, words to standard error.",
)
@click.option("--plot", type=click.Path(), default=str(PICTURE), show_default="docs/scale.png")
def command(
    cluster_path: str | None, model: str, dtype: str, batch: int, most: int,
    most_ranks: int, json_path: str, plot: str,
) -> None:  # fmt: skip
    """Plan a training on 1 to 512 devices of a described cluster."""
    check_writable(plot, json_path=json_path, reads=(cluster_path,))
    picture_format(plot)
    cluster, chosen = read_cluster(cluster_path), preset(model)
    console = console_for_output(json_path=json_path)
    budget = cluster.memory or DEVICES[cluster.device].memory_bytes
    if budget is None:
        raise ValueError(f"the memory of {cluster.device} is not known; give it in the cluster's description")
    shares = []
    state = chosen.config.state_shapes(chosen.shape).values()
    most_ranks = min(most, most_ranks, *(size for whole in state for size in whole[-3:-1]))
    for ranks in (2**power for power in range(most_ranks.bit_length())):
        problem = Problem(
            model=model, config=chosen.config, shape=chosen.shape, dtype=dtype, device=cluster.device,
            ranks=ranks, link=cluster.link(ranks), budget_bytes=budget,
        )  # fmt: skip
        share = planned_share(problem)
        text = (
            "nothing fits"
            if share is None
            else f"{format_seconds(share.seconds)} in {format_size(share.peak_bytes)}"
        )
        console.print(f"one input on {ranks} device{'s' * (ranks > 1)}: {text}", highlight=False)
        shares += [] if share is None else [share]
    rows = study(cluster, shares, batch, most)
    if not rows:
        raise ValueError(f"{model} fits no number of these devices; allow more --most-ranks or other devices")
    title = f"{model}, batch {batch}, {dtype}, {cluster.device} (simulated)"
    table = new_table(
        title, "devices", "replicas x ranks", "step", "summing gradients", "efficiency", "peak of each"
    )
    for found in rows:
        table.add_row(
            str(found["devices"]), f"{found['replicas']} x {found['ranks']}",
            format_seconds(found["step_seconds"]), format_seconds(found["reduction_seconds"]),
            f"{found['efficiency']:.0%}", format_size(found["peak_bytes"]),
        )  # fmt: skip
    print_table(table, console)
    write_json(
        json_path,
        {"title": title, "cluster": cluster.model_dump(), "shares": [vars(s) for s in shares], "rows": rows},
    )
    save_figure(draw(rows, title), plot)


if __name__ == "__main__":
    run_command(command, "python -m evoplan.experiments.scale")
