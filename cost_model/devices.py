"""What a device can do and what it adds to memory by itself. Free of torch.

Peak figures are the makers' for dense arithmetic; times made from them are lower bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30

DTYPES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Link:
    """What connects devices.

    Attributes:
        bandwidth: bytes per second that one device sends while it receives as many.
        latency: seconds until a message's first byte arrives.
    """

    bandwidth: float
    latency: float

    def seconds(self, sent_bytes: int, messages: int) -> float:
        """Time of sending that many bytes in so many messages, one after the other.

        Source: Hockney (1994), The communication challenge for MPP: latency and bandwidth.
        """
        return messages * self.latency + sent_bytes / self.bandwidth


# One 200 Gb/s adapter for each device, as in NVIDIA's DGX A100.
NETWORK = Link(25e9, 5e-6)
PER_NODE = 8  # devices that share a node


@dataclass(frozen=True)
class Device:
    """One accelerator or processor.

    Attributes:
        name: what users call it.
        memory_bytes: what it has; None where it is not known (this machine's memory).
        peak_flops: dense floating-point operations per second, by dtype.
        bandwidth: bytes per second between its memory and its cores.
        launch_seconds: cost of starting one kernel (on a CPU: of dispatching one operator).
        block_bytes: every allocation is rounded up to a multiple of this.
        workspace_bytes: what its libraries take once (cuBLAS).
        source: where the figures come from.
        link: to other devices of its node.
        host_bandwidth: bytes per second between its memory and the host's, each way; None where they are one.
        kind: cpu or cuda, what torch calls it.
    """

    name: str
    memory_bytes: int | None
    peak_flops: Mapping[str, float] = field(hash=False)
    bandwidth: float
    launch_seconds: float
    block_bytes: int
    workspace_bytes: int
    source: str
    link: Link
    host_bandwidth: float | None = None
    kind: str = "cuda"

    def in_blocks(self, size: int) -> int:
        """What an allocation of that many bytes takes."""
        return -(-size // self.block_bytes) * self.block_bytes


# Bytes per second over 16 lanes of PCI Express, by generation: about three quarters of what the lanes carry
# (PCI-SIG: 15.8, 31.5 and 63 GB/s), for copies of pinned memory.
_PCIE = {3: 12e9, 4: 24e9, 5: 50e9}


def _cuda(
    name: str,
    gib: float,
    half: float,
    single: float,
    double: float,
    bandwidth: float,
    source: str,
    link: float,
    bf16: float = 0,
    pcie: int = 4,
) -> Device:
    flops = {"float16": half, "bfloat16": bf16 or half, "float32": single, "float64": double}
    return Device(
        name=name,
        memory_bytes=int(gib * GIB),
        peak_flops={dtype: value * 1e12 for dtype, value in flops.items()},
        bandwidth=bandwidth * 1e9,
        launch_seconds=5e-6,
        block_bytes=512,
        # cuBLAS: 32 MiB on Hopper, a little over 8 MiB before (torch's CUBLAS_WORKSPACE_CONFIG defaults);
        # hipBLASLt: as much as on Hopper at most.
        workspace_bytes=(32 if name.startswith(("h", "mi")) else 9) * 2**20,
        source=source,
        link=Link(link * 1e9, 2e-6),
        host_bandwidth=_PCIE[pcie],
    )


# Half of the data sheets' figures for NVLink, Infinity Fabric and PCIe, which count both directions.
# A sheet's figure for one process: an MI250X is two devices of 64 GiB, each with half of everything.
_TABLE = (
    Device(
        name="cpu",
        memory_bytes=None,
        # Two cores of a 2024 server processor with AVX-512, measured with torch.matmul. Half precision
        # without native support is emulated.
        peak_flops={"float16": 1e9, "bfloat16": 200e9, "float32": 80e9, "float64": 40e9},
        bandwidth=25e9,
        launch_seconds=5e-6,
        block_bytes=1,
        workspace_bytes=0,
        source="measured on two cores, torch 2.13; indicative only",
        link=Link(1e9, 1e-4),  # gloo between processes
        kind="cpu",
    ),
    _cuda("v100-16gb", 16, 125, 15.7, 7.8, 900, "NVIDIA V100 data sheet (SXM2)", 150, bf16=15.7, pcie=3),
    _cuda("v100-32gb", 32, 125, 15.7, 7.8, 900, "NVIDIA V100 data sheet (SXM2)", 150, bf16=15.7, pcie=3),
    _cuda("a100-40gb", 40, 312, 19.5, 9.7, 1555, "NVIDIA A100 data sheet (SXM4)", 300),
    _cuda("a100-80gb", 80, 312, 19.5, 9.7, 2039, "NVIDIA A100 data sheet (SXM4)", 300),
    _cuda("h100-80gb", 80, 989, 67, 34, 3350, "NVIDIA H100 data sheet (SXM5)", 450, pcie=5),
    _cuda("h200-141gb", 141, 989, 67, 34, 4800, "NVIDIA H200 data sheet (SXM5)", 450, pcie=5),
    _cuda("mi250x-64gb", 64, 191.5, 23.95, 23.95, 1638, "AMD MI250X data sheet, one of two dies", 50),
    _cuda("mi300x-192gb", 192, 1307.4, 163.4, 81.7, 5300, "AMD Instinct MI300X data sheet", 64, pcie=5),
    _cuda("l4-24gb", 24, 121, 30.3, 0.49, 300, "NVIDIA L4 data sheet, dense", 32),
    _cuda("t4-16gb", 16, 65, 8.1, 0.25, 300, "NVIDIA T4 data sheet", 16, bf16=8.1, pcie=3),
    _cuda(
        "rtx4090-24gb", 24, 165, 82.6, 1.29, 1008, "NVIDIA Ada architecture white paper, fp32 accumulate", 32
    ),
)

DEVICES: dict[str, Device] = {device.name: device for device in _TABLE}


def link_of(device: Device, ranks: int) -> Link:
    """What ranks on such devices talk over: their node's link, or a network where one node is too small."""
    return device.link if ranks <= PER_NODE else NETWORK


def device(name: str) -> Device:
    """Look a device up; raises ValueError that lists the names."""
    try:
        return DEVICES[name]
    except KeyError:
        raise ValueError(
            f"unknown device {name!r}; choose one of: {', '.join(DEVICES)}, cuda, or a .json file"
        ) from None
