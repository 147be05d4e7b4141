"""Peaks predicted and measured, losses and times, without a plan and at half of the peak.

python -m evoplan.experiments.tiny_openfold.figures --json experiments/results/tiny-openfold.json
"""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

import click

from evoplan.model.config import InputShape
from evoplan.model.families import TinyOpenFoldConfig
from evoplan.planner.commands.flags import JSON_HELP
from evoplan.planner.commands.terminal import CHECK_FAILED, progress, run_command
from evoplan.planner.files import STDOUT, check_writable, write_json

# The original's configurations; medium with one sample, which is what a machine of 24 GB holds.
CASES = {
    "default": (TinyOpenFoldConfig(), InputShape(16, 64, batch=4)),
    "tiny": (TinyOpenFoldConfig(n_block=2, c_m=32, c_z=64), InputShape(8, 32, batch=8)),
    "medium": (TinyOpenFoldConfig(n_block=8, c_m=128, c_z=256), InputShape(32, 128, batch=1)),
}
SHARE, PEAK_TOLERANCE, LOSS_TOLERANCE, SLOWER = 0.5, 0.03, 1e-5, 1.35


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=list(CASES))
@click.option("--rounds", type=click.IntRange(2, 10_000), default=7, show_default=True, help="Steps of each.")
@click.option("--json", "json_path", type=click.Path(), help=JSON_HELP)
def figures(cases: tuple[str, ...], rounds: int, json_path: str | None) -> None:
    """A plan for half of the unplanned peak: its peak, its losses, its time; 1 if one is not as promised."""
    check_writable(json_path=json_path)
    import sys

    document: dict[str, Any] = {}
    for name in cases:
        with progress(name) as update:
            document[name] = found = compare(*CASES[name], rounds, update)
        click.echo(
            f"{name}: peak {found['measured_peak_bytes'] / 2**20:.1f} MiB, predicted/measured "
            f"{found['predicted_peak_bytes'] / found['measured_peak_bytes']:.4f}; planned for half: "
            f"{found['planned_peak_bytes'] / found['measured_peak_bytes']:.3f} of it, predicted/measured "
            f"{found['planned_predicted_bytes'] / found['planned_peak_bytes']:.4f}, time "
            f"{found['ratio']:.3f} ({found['ratio_quartiles'][0]:.3f}-{found['ratio_quartiles'][1]:.3f}), "
            f"largest difference of a loss {found['loss_difference']:.1e}",
            err=json_path == STDOUT,
        )
        if json_path and json_path != STDOUT:  # what there is, should it be stopped
            write_json(json_path, document)
    if json_path == STDOUT:
        write_json(json_path, document)
    sys.exit(0 if all(_as_promised(found) for found in document.values()) else CHECK_FAILED)


def compare(config: TinyOpenFoldConfig, shape: InputShape, rounds: int, update: Any) -> dict[str, Any]:
    """Both trainings side by side, steps in turn."""
    from evoplan.cost_model.devices import device
    from evoplan.experiments.tiny_openfold.memory import measure_peak, plan_for, predict
    from evoplan.experiments.tiny_openfold.training import Recipe, TinyTraining
    from evoplan.planner.problems.problem import Problem
    from evoplan.planner.processes.world import World

    recipe = Recipe(config, shape, task="distance")
    plain = TinyTraining(recipe, World())
    update("without a plan")
    plain.step(plain.batch(0))
    peak, _ = measure_peak(plain, 1)
    problem = Problem(model="tiny-openfold", config=config, shape=shape)
    plan = plan_for(recipe, problem, int(SHARE * peak), update)
    planned = TinyTraining(recipe, World(), plan)
    update("under a plan")
    planned.step(planned.batch(0))
    planned_peak, _ = measure_peak(planned, 1)
    results = []
    for number in range(2, 2 + rounds):
        update(f"round {number - 1} of {rounds}")
        results.append((plain.step(plain.batch(number)), planned.step(planned.batch(number))))
    ratios = [under.seconds / without.seconds for without, under in results]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    where = device("cpu")
    return {
        "config": vars(config),
        "shape": vars(shape),
        "measured_peak_bytes": peak,
        "predicted_peak_bytes": predict(recipe, where).peak_bytes,
        "planned_peak_bytes": planned_peak,
        "planned_predicted_bytes": predict(recipe, where, plan).peak_bytes,
        "seconds": median(without.seconds for without, _ in results),
        "planned_seconds": median(under.seconds for _, under in results),
        "ratio": median(ratios),
        "ratio_quartiles": [low, high],
        "loss_difference": max(abs(a.loss - b.loss) / a.loss for a, b in results),
        "losses": [without.loss for without, _ in results],
    }


def _as_promised(found: dict[str, Any]) -> bool:
    pairs = (
        ("predicted_peak_bytes", "measured_peak_bytes"),
        ("planned_predicted_bytes", "planned_peak_bytes"),
    )
    return (
        all(abs(found[a] / found[b] - 1) <= PEAK_TOLERANCE for a, b in pairs)
        and found["planned_peak_bytes"] <= SHARE * found["measured_peak_bytes"]
        and found["loss_difference"] <= LOSS_TOLERANCE
        and found["ratio"] <= SLOWER
    )


if __name__ == "__main__":
    run_command(figures, "python -m evoplan.experiments.tiny_openfold.figures")
