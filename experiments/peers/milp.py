"""torch.distributed._tools.sac_ilp: which modules to recompute, by an integer program under a budget."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from evoplan.experiments.peers.by_hand import ByHand, again
from evoplan.experiments.peers.registry import SHARES, Peer, Setting, UnavailableError, register
from evoplan.model.running.kinds import WHOLE

SOURCE = "torch.distributed._tools.sac_ilp.sac_milp"
ROOT = "stack"
# Its estimators, tried on the smallest model: they may abort the process, so that it is another one.
PROBE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.sac_estimator import SACEstimator
with FakeTensorMode(), torch.device({device!r}):
    with SACEstimator()("operator-level-cost-model"):
        torch.nn.Linear(8, 8)(torch.ones(4, 8)).sum()
"""


def probe(device: str) -> str | None:
    """Why torch's own estimators cannot be used on a device; None where they can."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(device=device)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    return f"SACEstimator on {device}: {said[-1]}"


def _estimated(setting: Setting, budget: float | None) -> nn.Module:
    reason = probe(setting.costed.problem.device)
    if reason is None:
        return _milp(setting, budget)
    raise UnavailableError(reason)


def _stats(name: str, steps: range, setting: Setting) -> dict[str, Any]:
    """What the program wants to know of the module that runs some steps, from our cost table."""
    table = setting.costed.table
    whole = [next(c for c in options if c.strategy == WHOLE) for options in table.options]
    held = [cost.preserved_bytes + table.made_bytes(step) for step, cost in enumerate(whole)]
    seconds = sum(whole[step].discard_seconds for step in steps)
    activations = sum(held[step] for step in steps)
    gradients = max(
        whole[s].backward_bytes - whole[s].preserved_bytes + table.gradient_bytes(s + 1) for s in steps
    )
    return {
        "fqn": name, "param_per_module": 0, "grad_per_module": 0, "grad_total": 0,
        "act_fw_per_module": activations, "act_bw_per_module": activations,
        "act_grad_per_module": gradients, "act_total": sum(held[: steps.stop]),
        "input_per_module": 0, "output_per_module": 0,
        "fw_runtime_per_module": seconds * 1e3, "bw_runtime_per_module": 0.0, "is_leaf": False,
        "sac_runtime": seconds * 1e3, "sac_memory": activations,
        # All of a module is made again, or nothing: whatever is discarded takes the whole time.
        "n_segments": 1, "slopes": [0.0], "intercepts": [1.0], "breakpoints": [0.0, 1.0],
        "tradeoff_curve": OrderedDict({0.0: 1.0, 1.0: 1.0}),
    }  # fmt: skip


def chosen_modules(setting: Setting, budget_bytes: int) -> set[str]:
    """Names of the modules to recompute: blocks (`stack.3`) and submodules (`stack.3.14`, by step).

    Raises:
        UnavailableError: the program finds nothing.
        ImportError: pulp is not there.
    """
    from torch.distributed._tools.ilp_utils import parse_module_info
    from torch.distributed._tools.sac_ilp import sac_milp

    groups = setting.costed.table.groups
    stats = [_stats(ROOT, range(len(setting.costed.table.options)), setting)]
    post: list[str] = []
    for number, group in enumerate(groups):
        stats.append(_stats(f"{ROOT}.{number}", group, setting))
        for step in group:
            stats.append(_stats(f"{ROOT}.{number}.{step}", range(step, step + 1), setting))
            post.append(stats[-1]["fqn"])
        post.append(f"{ROOT}.{number}")
    pre, post = [each["fqn"] for each in stats], [*post, ROOT]
    order = {
        "fw_pre_order": pre, "bw_pre_order": post[::-1], "fw_post_order": post, "bw_post_order": pre[::-1],
    }  # fmt: skip
    graph = parse_module_info({"mod_order": order, "mod_stats": stats})  # type: ignore[typeddict-item]
    decisions, _, peak = sac_milp(graph, budget_bytes / 2**30, ac_units=pre[1:])
    if peak < 0:
        raise UnavailableError("its program finds nothing that fits")
    return set(decisions)


def _milp(setting: Setting, budget: float | None) -> nn.Module:
    modules = chosen_modules(setting, int(budget or 0))

    def around_block(part: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return again(part, *tensors) if f"{ROOT}.{part.args[0]}" in modules else part(*tensors)

    def around_step(part: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        step = part.args[0]
        name = f"{ROOT}.{step.group}.{step.index}"
        return again(part, *tensors) if name in modules else part(*tensors)

    return ByHand(setting.stack, around_block=around_block, around_step=around_step)


register(
    Peer("sac-milp-estimators", "an integer program over modules, with torch's own estimators", SOURCE,
         "automatic", _estimated, "bytes", SHARES[2:3]),
    Peer("sac-milp", "the same program, with evoplan's measured costs of blocks and submodules", SOURCE,
         "automatic", _milp, "bytes", SHARES),
)  # fmt: skip
