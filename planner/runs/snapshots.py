"""Snapshots of a training: parameters, optimizer states and the step, by torch.distributed.checkpoint.

A snapshot is a folder `step-N`. It is written under another name and renamed when all of it is on disk, so
that a run can be killed at any moment and the last complete one is there; the last two are kept. One run at
a time writes to a folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from evoplan.planner.errors import CommonError, RunError
from evoplan.planner.files import lock_folder, make_folder, write_json
from evoplan.planner.processes.watch import first_line
from evoplan.planner.processes.world import World

KEPT = 2
_ABOUT = "snapshot.json"
_PREFIX, _UNFINISHED = "step-", ".unfinished-"
_NAME = re.compile(_PREFIX + r"(\d{8,})")


class Trained(Protocol):
    """What can be snapshot: parameters by names that no plan changes, and the optimizer that moves them."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None

    def finite(self) -> bool:
        """Whether all parameters are."""


class Snapshots:
    """The snapshots of one training, in a folder that all ranks see; all ranks call every method.

    The first rank holds the folder until `close`, or until its process ends, however it ends.

    Args:
        about: what has to be the same where a training goes on: plain types, by what they are called.

    Raises:
        CommonError: another run holds the folder.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any], world: World) -> None:
        self.folder, self.about, self.world = Path(folder), about, world
        self._lock = lock_folder(make_folder(folder)) if world.first else None
        if not world.gathered_objects(self._lock is not None)[0]:
            raise CommonError(
                f"{folder}: another run writes its snapshots here; wait for its end or name another folder"
            )
        if world.first:  # what a run that was killed left
            for path in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        world.barrier()

    def close(self) -> None:
        """Let the folder go, for other runs."""
        if self._lock is not None:
            self._lock.close()

    def newest(self) -> int:
        """Steps that the newest complete snapshot has seen; 0 where there is none."""
        steps = self._steps() if self.world.first else []
        newest: int = self.world.gathered_objects(max(steps, default=0))[0]
        return newest

    def save(self, step: int, training: Trained, notes: Mapping[str, Any] | None = None) -> None:
        """Write a snapshot after `step` steps; RunError where they led nowhere.

        Args:
            notes: plain types that `load` is to give back.
        """
        if not training.finite():
            raise RunError(f"parameters are not finite after step {step}; try a smaller --learning-rate")
        unfinished = self.folder / f"{_UNFINISHED}{step}"
        _on_disk(unfinished, lambda: save(_tensors(training), checkpoint_id=unfinished, no_dist=self._alone))
        if not self.world.first:
            return
        write_json(unfinished / _ABOUT, {**self.about, "step": step, "notes": notes})
        _sync(unfinished / _ABOUT)
        _sync(unfinished)
        shutil.rmtree(self._path(step), ignore_errors=True)  # what a damaged one left
        unfinished.rename(self._path(step))
        _sync(self.folder)
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(self._path(old))

    def load(self, step: int, training: Trained) -> Any:
        """Bring parameters and optimizer back to where they were after `step` steps.

        Returns:
            The notes taken then.

        Raises:
            ValueError: the snapshot is of another training; the message says what differs.
        """
        path = self._path(step)
        with _whole(path):
            about = dict(json.loads((path / _ABOUT).read_text(encoding="utf-8")))
        for what, ours in self.about.items():
            if about.get(what) != ours:
                raise ValueError(
                    f"{path} is of another {what} than the plan and flags given; name another folder"
                )
        tensors = _tensors(training)
        with _whole(path):
            found = FileSystemReader(path).read_metadata().state_dict_metadata
            # A fresh optimizer has no states yet.
            for key, stored in found.items():
                if key not in tensors:
                    if not isinstance(stored, TensorStorageMetadata):
                        raise TypeError(f"{key} is no tensor")
                    tensors[key] = torch.empty(
                        stored.size, dtype=stored.properties.dtype, device=self.world.device
                    )
            _on_disk(path, lambda: load(tensors, checkpoint_id=path, no_dist=self._alone))
        if training.optimizer is not None:
            for name, parameter in training.parameters.items():
                prefix = f"optimizer/{name}/"
                states = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                if states:
                    training.optimizer.state[parameter] = states
        return about.get("notes")

    @property
    def _alone(self) -> bool:
        return self.world.mesh is None

    def _path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"

    def _steps(self) -> list[int]:
        names = (path.parent.name for path in self.folder.glob(f"{_PREFIX}*/{_ABOUT}"))
        return sorted(int(match.group(1)) for name in names if (match := _NAME.fullmatch(name)))


def _tensors(training: Trained) -> dict[str, Tensor]:
    """Everything that a snapshot holds, by name; the tensors themselves."""
    tensors = {f"parameters/{name}": p.detach() for name, p in training.parameters.items()}
    if training.optimizer is not None:
        for name, parameter in training.parameters.items():
            for key, state in training.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = state
    return tensors


def _on_disk(path: Path, work: Callable[[], object]) -> None:
    """Read or write a snapshot; torch's own errors are many lines long, and it wonders at being alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            work()
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"{path}: snapshot of rank {rank} failed ({first_line(reason)})") from None


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Reading a snapshot that somebody may have damaged: whatever that leads to, in one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path} is damaged ({first_line(error)}); delete it, to go on from the one before or anew"
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
