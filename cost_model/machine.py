"""What this machine calls itself, and where it keeps what was measured and traced."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch


def local_name(device: str) -> str:
    """What to call this machine's device, such that times carry over to whatever is called the same."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("no CUDA device here; use --device cpu, or a machine that has one")
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def kernels_of_cpu() -> tuple[Any, ...]:
    """What decides which of torch's CPU kernels run here, and so what scratch they take.

    A processor's name does not: virtual machines call many by one. oneDNN's half precision goes by AVX-512
    with bfloat16 or float16 and by AMX, as far as the environment lets it.
    """
    limits = {name: os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")}
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = {name: value for name, value in found.items() if isinstance(value, bool)}
    return torch.backends.cpu.get_cpu_capability(), sorted(known.items()), sorted(limits.items())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def default_cache() -> Path:
    """EVOPLAN_CACHE, or evoplan/times.sqlite where the user's caches are."""
    if "EVOPLAN_CACHE" in os.environ:
        return Path(os.environ["EVOPLAN_CACHE"])
    return caches_folder() / "times.sqlite"


def caches_folder() -> Path:
    """Where this user's caches of evoplan are."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        caches = Path(tempfile.gettempdir()) / f"caches-{os.getuid()}"
    return caches / "evoplan"
