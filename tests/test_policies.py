"""The original benchmark's policies and the study of scale, on small sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from evoplan.experiments import scale
from evoplan.experiments.alphafold2 import command
from evoplan.experiments.policies import POLICIES, figures, original, plan_under, seed_rows
from evoplan.experiments.scale import Cluster, Share, study
from evoplan.model.running.kinds import WHOLE
from evoplan.planner.problems.costing import Costed, cost_problem
from evoplan.planner.schedules.schedule import depth
from evoplan.planner.solvers.baselines import evenly_chunked


@pytest.fixture(scope="module", params=["single", "dap", "single-inference"])
def costed(request: pytest.FixtureRequest) -> Costed:
    policy = POLICIES[request.param]
    return cost_problem(policy.problem((6, 10), policy.ranks[0], "v100-32gb", blocks=2))


def test_every_original_row_has_its_policy() -> None:
    for row in seed_rows():
        policy = POLICIES[row["policy"]]
        assert (row["n_seq"], row["n_res"]) in policy.shapes
        assert row["ranks"] in policy.ranks
    assert original("dap", "large", (512, 384), 2)["peak_mb"] == 9416
    assert original("single", "planned", (512, 384), 1)["schedule"] == "large"  # small ran out of memory
    assert original("single", "large", (5, 7), 1) is None


def test_one_chunk_size_for_all(costed: Costed) -> None:
    schedule = evenly_chunked(costed.table, 4)
    runs = list(_runs(schedule) if costed.table.training else schedule.parts)
    cut = [run.strategy for run in runs if run.strategy != WHOLE]
    assert cut
    assert {strategy.kind for strategy in cut} == {"chunk"}
    assert max(strategy.n for strategy in cut) == 4
    assert depth(schedule) == (1 if costed.table.training else 0)
    # The fewest pieces that fit are taken.
    roomy, tight = (plan_under(costed, "chunk", budget).predicted for budget in (2**40, 1))
    assert tight.activation_bytes < roomy.activation_bytes
    assert tight.step_seconds > roomy.step_seconds


def _runs(schedule):
    for part in schedule.parts:
        yield from part.body.parts
        yield from part.first_pass()


def test_figures_are_what_the_schedule_does(costed: Costed) -> None:
    found = figures(costed, plan_under(costed, "planned", None))
    assert found["peak_bytes"] == pytest.approx(found["predicted_peak_bytes"], rel=1e-3)
    if costed.table.training:
        none, large = (figures(costed, plan_under(costed, name, None)) for name in ("none", "large"))
        assert large["held_bytes"] < none["held_bytes"] <= none["peak_bytes"]
    else:
        assert found["held_bytes"] is None
        with pytest.raises(ValueError, match="inference has none; use chunk"):
            plan_under(costed, "small", None)


def test_the_command(tmp_path) -> None:
    arguments = [
        "--policy",
        "dap",
        "--schedule",
        "large",
        "--n-seq",
        "6",
        "--n-res",
        "10",
        "--blocks",
        "1",
        "--ranks",
        "3",
    ]
    done = CliRunner().invoke(command, [*arguments, "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert (row["ranks"], row["schedule"]) == (3, "large")


SHARES = [Share(1, 100, 50, 200, 1.0, 8), Share(2, 60, 30, 110, 0.55, 8)]


def test_more_devices_than_inputs_share_them() -> None:
    rows = study(Cluster(), SHARES, batch=4, most=16)
    assert [(row["devices"], row["replicas"], row["ranks"]) for row in rows] == [
        (1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 4, 2),
    ]  # fmt: skip
    assert rows[0]["step_seconds"] == 4.0
    assert rows[0]["efficiency"] == 1.0
    assert rows[3]["step_seconds"] == pytest.approx(0.55 + rows[3]["reduction_seconds"])


def test_beyond_a_node_the_network_counts() -> None:
    slow = Cluster(devices_per_node=2, network={"bandwidth": "8B", "latency": 0.0})
    rows = study(slow, SHARES, batch=4, most=4)
    assert rows[1]["reduction_seconds"] < 1e-3
    assert rows[2]["reduction_seconds"] == pytest.approx(1.5)


def test_what_fits_no_single_device_starts_later() -> None:
    rows = study(Cluster(), [replace(SHARES[1])], batch=4, most=4)
    assert [row["devices"] for row in rows] == [2, 4]
    assert rows[0]["efficiency"] == 1.0


@pytest.mark.parametrize(
    ("document", "says"),
    [("{", "not JSON"), ('{"device": "x"}', "unknown device"), ('{"memory": "-1"}', "not a size"),
     ('{"nodes": 3}', "nodes")],
)  # fmt: skip
def test_clusters_that_make_no_sense(document: str, says: str, tmp_path) -> None:
    (tmp_path / "cluster.json").write_text(document)
    with pytest.raises(ValueError, match=says):
        scale.read_cluster(str(tmp_path / "cluster.json"))


def test_scale_writes_its_study(tmp_path) -> None:
    paths = tmp_path / "scale.json", tmp_path / "scale.png"
    arguments = ["--model", "alphafold2-narrow", "--batch", "2", "--most", "4", "--most-ranks", "2"]
    done = CliRunner().invoke(scale.command, [*arguments, "--json", str(paths[0]), "--plot", str(paths[1])])
    assert done.exit_code == 0, done.output
    rows = json.loads(paths[0].read_text())["rows"]
    assert [row["devices"] for row in rows] == [1, 2, 4]
    assert rows[2]["ranks"] == 2
    assert paths[1].read_bytes().startswith(b"\x89PNG")
