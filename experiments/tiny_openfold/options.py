"""How a run goes, besides what it trains; free of torch, so that wrong flags are said before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

SUMMARY = "performance_summary.json"

# Columns of the table of operators. Names with cuda are those of older versions of torch for device.
_TIMES_AND_BYTES = (
    "{}_time",
    "{}_time_total",
    "self_{}_time_total",
    "{}_memory_usage",
    "self_{}_memory_usage",
)
SORT_BY = tuple(name.format(kind) for kind in ("cpu", "cuda", "device") for name in _TIMES_AND_BYTES)


@dataclass(frozen=True)
class ProfilerConfig:
    """What to profile, by the names that performance_summary.json has.

    Attributes:
        warmup_steps: timed steps before the profile; one more warms the profiler up.
        sort_by: column of the table of operators; on a CPU a GPU's column stands for the CPU's.
    """

    enable_pytorch_profiler: bool = False
    enable_memory_profiling: bool = False
    profile_operators: bool = False
    profile_dir: str = "./pytorch_profiles"
    sort_by: str = "cuda_time_total"
    warmup_steps: int = 3
    profile_steps: int = 5

    @property
    def enabled(self) -> bool:
        """Whether the profiler runs."""
        return self.enable_pytorch_profiler or self.profile_operators

    @property
    def steps_needed(self) -> int:
        """Timed steps until the trace is written."""
        return self.warmup_steps + 1 + self.profile_steps if self.enabled else 0


@dataclass(frozen=True)
class Options:
    """The other flags, by their names.

    Attributes:
        validate_setup: a trial of this machine: nothing is written.
    """

    num_steps: int
    device: str | None
    no_data_parallel: bool
    enable_torch_compile: bool
    plan_path: str | None
    memory: int | None
    snapshots: str
    save_every: int | None
    resume: bool
    validate_setup: bool
