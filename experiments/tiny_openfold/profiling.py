"""PyTorch's profiler around some steps: traces for TensorBoard and Perfetto, and a table of operators."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from evoplan.experiments.tiny_openfold.options import ProfilerConfig
from evoplan.planner.files import write_text

OPERATORS = "operators.txt"
ROWS = 40


class StepProfiler:
    """Profiles some of the timed steps; `step()` after each."""

    def __init__(self, config: ProfilerConfig, kind: str, rank: int) -> None:
        self.config, self.kind, self.rank = config, kind, rank
        self._profiler: profile | None = None
        if not config.enabled:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (kind == "cuda")
        self._profiler = profile(
            activities=activities,
            record_shapes=True,
            profile_memory=config.enable_memory_profiling,
            with_flops=True,
            schedule=schedule(wait=config.warmup_steps, warmup=1, active=config.profile_steps, repeat=1),
            on_trace_ready=self._ready,
        )

    def __enter__(self) -> StepProfiler:
        if self._profiler is not None:
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(kind, error, trace)

    def step(self) -> None:
        """A timed step is over."""
        if self._profiler is not None:
            self._profiler.step()

    def _ready(self, profiler: profile) -> None:
        if self.config.enable_pytorch_profiler:
            tensorboard_trace_handler(self.config.profile_dir, worker_name=f"rank{self.rank}")(profiler)
        if self.config.profile_operators and self.rank == 0:
            column = self.config.sort_by.replace("cuda", "device")
            if self.kind != "cuda":
                column = column.replace("device", "cpu")
            table = profiler.key_averages().table(sort_by=column, row_limit=ROWS)
            write_text(Path(self.config.profile_dir) / OPERATORS, table)


def system_info(device: torch.device) -> dict[str, str | None]:
    """Where a run was, as performance_summary.json says it."""
    return {
        "device": str(device),
        "gpu_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "pytorch_version": torch.__version__,
        "rocm_version": torch.version.hip or "N/A",
    }
