"""A model's chain, as it is found without data and then on what the model is called with."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from evoplan.cost_model.casting import Casting
from evoplan.cost_model.devices import Device
from evoplan.model.foreign.capture import Captured, CaptureError
from evoplan.model.foreign.rehearsal import rehearsed
from evoplan.planner.fitting.simulating import Given, Loss, captured

_ROOT = Path(__file__).parents[2]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capturing:
    """How a model's chain is found.

    Attributes:
        run: its forward on what it is called with; None: that has no data.
        becoming: is told which modules of it have made tables that they keep.
    """

    model: nn.Module
    given: Given
    device: Device
    loss: Loss
    casting: Casting
    autocast: torch.dtype | None
    run: Callable[[], Any] | None
    becoming: set[nn.Module]

    def chain(self) -> tuple[Captured, str]:
        """The chain, and where tensors without data were: on the meta device where that tells the same."""
        found, place = self._without_data()
        if self.run is None:
            return found, place
        if found.tables:  # such as cosines of places: blocks are planned as they are from the second call on
            self.becoming.update(map(self.model.get_submodule, found.tables))
            with torch.no_grad(), in_one_line(f"{type(self.model).__name__} does not run as it is called"):
                self.run()
            found, place = self._without_data()
        return rehearsed(self.model, found, self.run), place

    def _without_data(self) -> tuple[Captured, str]:
        about = self.model, self.given, self.device, self.loss, self.casting
        if self.autocast is None:  # which the meta device does not know
            try:
                chain = captured(*about, "meta")
                if not chain.unlike_on_meta:
                    return chain, "meta"
            except CaptureError:
                raise
            except Exception as error:  # the model's own code, which may name a device or look at values
                logger.debug("not on the meta device: %s", error)
        with in_one_line(f"{type(self.model).__name__} cannot be copied or run without data"):
            return captured(*about), "cpu"


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Errors of somebody else's code become a `CaptureError`, which says what does not work, and why."""
    try:
        yield
    except CaptureError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CaptureError(
            f"the model or its loss looks at the values of tensors, of which a plan knows none ({error}"
            f"{_where(error)}); have it do so after the step, or leave it unplanned"
        ) from None
    except Exception as error:
        said = str(error).partition("\n")[0][:300]
        raise CaptureError(f"{what} ({type(error).__name__}: {said}{_where(error)})") from None


def _where(error: Exception) -> str:
    """The line of somebody else's code that an error comes from."""
    ours = {
        str(Path(torch.__file__).parent),
        *(str(_ROOT / room) for room in ("cost_model", "model", "planner")),
    }
    frames = reversed(traceback.extract_tb(error.__traceback__))
    theirs = (f for f in frames if not any(f.filename.startswith(folder) for folder in ours))
    return next((f", at {Path(f.filename).name}, line {f.lineno}" for f in theirs), "")
