"""Devices that the table does not have, from a JSON file.

{"name": "mygpu", "memory": "48GiB", "peak_flops": {"float32": 4e13, "bfloat16": 1.6e14},
 "bandwidth": 9e11, "source": "its data sheet"}
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from evoplan.cost_model.devices import DTYPES, Device, Link
from evoplan.planner.sizes import parse_size

Rate = Annotated[float, Field(ge=1, le=1e30)]
Seconds = Annotated[float, Field(ge=0, le=1e3)]
Size = Annotated[int, BeforeValidator(lambda value: parse_size(value) if isinstance(value, str) else value)]


IN_A_LINE = r"^[^\x00-\x1f\x7f-\x9f]+$"  # what is printed in one


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)  # neither true nor "1" is a number


class LinkEntry(_Strict):
    """What connects devices, as people write it down; the units are those of `Link`."""

    bandwidth: Rate
    latency: Seconds = 2e-6


class DeviceEntry(_Strict):
    """A device as people write it down; the units are those of `Device`.

    Attributes:
        memory: bytes, or like "48GiB".
        peak_flops: FLOP/s by dtype; plans for other dtypes are refused.
        link, host_bandwidth: half of PCI Express 4 where they are not given.
    """

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=IN_A_LINE)]
    memory: Annotated[Size, Field(ge=1, le=2**60)] | None
    peak_flops: Annotated[dict[str, Rate], Field(min_length=1)]
    bandwidth: Rate
    source: str
    kind: Literal["cpu", "cuda"] = "cuda"
    launch_seconds: Seconds = 5e-6
    block_bytes: Annotated[int, Field(ge=1, le=2**30)] = 512
    workspace_bytes: Annotated[Size, Field(ge=0, le=2**60)] = 9 * 2**20
    link: LinkEntry = LinkEntry(bandwidth=16e9)
    host_bandwidth: Rate | None = None

    @field_validator("peak_flops")
    @classmethod
    def _known_dtypes(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = set(value) - set(DTYPES)
        if unknown:
            raise ValueError(f"unknown dtype {min(unknown)!r}; choose from: {', '.join(DTYPES)}")
        return value

    def device(self) -> Device:
        """The device described."""
        fields = self.model_dump(exclude={"memory", "link"})
        return Device(memory_bytes=self.memory, link=Link(**self.link.model_dump()), **fields)


@contextmanager
def one_line(about: str = "") -> Iterator[None]:
    """Validation whose error is a ValueError with the first of what is wrong, after what it is about."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) + ": " if first["loc"] else ""
        raise ValueError(f"{about}{where}{first['msg'].removeprefix('Value error, ')}") from None


def load_device(path: str | Path) -> Device:
    """Read a device file.

    Raises:
        ValueError: it is missing, no JSON, or lacks something; names it and says what.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        with one_line(f"{path}: "):
            return DeviceEntry.model_validate_json(text).device()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a device file or a name") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a device file; see docs/times.md for what one holds") from None


def own_device(name: str) -> Device | None:
    """The device that a file describes, where a device's name is one: it ends in .json."""
    return load_device(name) if name.endswith(".json") else None


def device_entry(device: Device) -> dict[str, Any]:
    """What a device's file holds."""
    link = LinkEntry(bandwidth=device.link.bandwidth, latency=device.link.latency)
    shared = {name: getattr(device, name) for name in DeviceEntry.model_fields if hasattr(device, name)}
    entry = DeviceEntry(**shared | {"memory": device.memory_bytes, "link": link})
    return entry.model_dump()
