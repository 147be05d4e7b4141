"""The device that a model is planned for, and where times on it come from."""

from __future__ import annotations

from evoplan.cost_model.devices import Device, device
from evoplan.cost_model.local import local_cuda
from evoplan.cost_model.machine import default_cache
from evoplan.cost_model.times_cache import TimesCache
from evoplan.planner.problems.device_file import own_device


def device_of(
    kind: str, dtype: str, named: str | Device | None, listed: bool
) -> tuple[Device, str, Device | None]:
    """The device; where its times come from; and once more what the device table does not have.

    Args:
        kind: of where the model lies.
        named: it, or its name or file; where the model lies if not given.
        listed: times are of the figures as they are listed, also where calibrated ones are known.
    """
    named = named or ("cuda" if kind == "cuda" else "cpu")
    own = named if isinstance(named, Device) else own_device(named)
    where = own or (local_cuda() if named == "cuda" else device(str(named)))
    if dtype not in where.peak_flops:
        raise ValueError(f"device {where.name} has no peak_flops for {dtype}")
    if listed or own or named not in ("cpu", "cuda"):
        return where, "roofline", own
    calibration = TimesCache(default_cache(), str(named)).calibration(dtype)
    if calibration is None:
        return where, "roofline", None
    return calibration.applied(where, dtype), "calibrated", None
