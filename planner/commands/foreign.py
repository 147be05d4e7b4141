"""Commands on models that were written elsewhere, which a file builds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click

from evoplan.planner.commands.flags import files_read, json_option
from evoplan.planner.commands.terminal import console_for_output, progress
from evoplan.planner.files import check_writable, write_json

SOURCE = "FILE.py:FUNCTION, which returns (model, args), and kwargs, loss and knobs if there are any"
_TAKEN = {"memory", "optimizer", "device", "mixed", "certify"}  # flags that go with --from


class Built(NamedTuple):
    """What a file builds: the first arguments of `evoplan.fit`, and knobs."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Any
    knobs: dict[str, Any]


def built_by(source: str) -> Built:
    """The model, what it is called with, its loss and its knobs, as a function in a file makes them.

    Raises:
        ValueError: there is no such file or function, it fails, or returns something else; says which.
    """
    path, _, name = source.rpartition(":")
    if not path or not name.isidentifier():
        raise ValueError(f"{source} is no model; give {SOURCE}")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give {SOURCE}")
    make = getattr(_module_of(path), name, None)
    if not callable(make):
        raise ValueError(f"{path} has no function {name}; give {SOURCE}")
    with _said_of(source):
        made = make()
    return _checked(source, made)


def _module_of(path: str) -> ModuleType:
    """A file, executed as Python executes one: what lies beside it may be imported, then and later."""
    spec = importlib.util.spec_from_file_location(f"evoplan_from_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; give {SOURCE}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    beside = str(Path(path).parent.resolve())
    if beside not in sys.path:
        sys.path.insert(0, beside)
    with _said_of(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _said_of(source: str) -> Iterator[None]:
    """An error of somebody else's code, or its end of the process, is a ValueError that says whose."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{source} fails: {type(error).__name__}: {error}") from None


@contextmanager
def running(source: str) -> Iterator[None]:
    """What is raised by a model that a file built; where it ends the process, a ValueError says so."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(
            f"{source}: its model ends the process (SystemExit: {error}); have it raise an error"
        ) from None


def _checked(source: str, made: Any) -> Built:
    from torch import nn

    few = isinstance(made, tuple) and 2 <= len(made) <= 5
    model, args, kwargs, loss, knobs = (*made, None, None, None)[:5] if few else (None,) * 5
    named = all(part is None or isinstance(part, Mapping) for part in (kwargs, knobs))
    called = loss is None or callable(loss)
    if not (isinstance(model, nn.Module) and isinstance(args, tuple) and named and called):
        raise ValueError(
            f"{source} returns something else; give {SOURCE}: a module, a tuple, a dictionary (which may be "
            "empty), a function and a dictionary, in this order"
        )
    return Built(model, args, dict(kwargs or {}), loss, dict(knobs or {}))


def plan_from(
    source: str, flags: dict[str, Any], out: str | None, json_path: str | None, certify: bool = False
) -> None:
    """Plan the model that a file builds; print the plan.

    Args:
        certify: also prove how far from optimal it may be.
        flags: of `evoplan plan`; those that describe a preset have no place here.
    """
    model, args, kwargs, loss, options = _asked_for(source, flags)
    from evoplan.planner.fitting.fitted import fit

    with progress("planning"), running(source):
        fitted = fit(model, args, kwargs, flags["memory"], loss, **options)
    if certify:
        with progress("bounding"):
            fitted.certify()
    for path in filter(None, (out, json_path)):
        fitted.plan.save(path)
    console = console_for_output(json_path=json_path)
    console.print(fitted.report(), highlight=False, soft_wrap=True)
    if out:
        console.print(f"plan written to {out}", highlight=False, soft_wrap=True)


def swept_from(source: str, flags: dict[str, Any], points: int, html: str | None = None) -> dict[str, Any]:
    """The frontier of the model that a file builds, as `planner.plans.sweeping.sweep` has that of our own.

    Args:
        flags: of `evoplan sweep`.
        points: how many budgets are tried.
        html: where to write a page about it.
    """
    if flags["memory"] is not None:
        raise ValueError("a sweep has all budgets; leave --memory out")
    model, args, kwargs, loss, options = _asked_for(source, flags)
    from evoplan.planner.fitting.fitted import fit

    with progress("sweeping") as update, running(source):
        return fit(model, args, kwargs, None, loss, **options).sweep(points, html, update.done)


_TIMES = {"auto": "predicted", "roofline": "roofline", "measured": "measured"}


def _asked_for(source: str, flags: dict[str, Any]) -> tuple[Any, ...]:
    """What a file builds, and the options of `evoplan.fit` that flags tell."""
    context = click.get_current_context()
    for name in {*flags, "solver_name", "certify", "cache"} - _TAKEN:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            (flag,) = (param.opts[0] for param in context.command.params if param.name == name)
            raise ValueError(f"--from has a model and shapes of its own; leave {flag} out")
    import torch

    from evoplan.planner.problems.problem import AUTOCAST

    with progress("making the model"):
        built = built_by(source)
    chosen = context.get_parameter_source("device") is click.core.ParameterSource.COMMANDLINE
    mixed = flags["mixed"]
    options = {
        "optimizer": flags["optimizer"],
        "device": flags["device"] if chosen else None,
        "autocast": getattr(torch, AUTOCAST[mixed]) if mixed else None,
        "times": _TIMES.get(context.params.get("times", "auto")),
    }
    if options["times"] is None:
        raise ValueError("--from takes --times measured or roofline: nothing was profiled of the model")
    return *built[:4], options | {"knobs": built.knobs}


@click.command()
@click.argument("source", metavar="FILE.py:FUNCTION")
@click.option("--device", help="To plan for: of the device table, or a device file; else where it lies.")
@json_option
def inspect(source: str, device: str | None, json_path: str | None) -> None:
    """Find the blocks of a model that somebody wrote: what they are given and keep, and where the peak is.

    FUNCTION returns (model, args), and kwargs, loss and knobs if there are any.
    """
    check_writable(json_path=json_path, reads=files_read(source=source, device=device or ""))
    from dataclasses import asdict

    from evoplan.planner.fitting.inspecting import inspect as inspected

    with progress("making the model"):
        built = built_by(source)
    with progress("looking for blocks"), running(source):
        found = inspected(built.model, built.args, built.kwargs, built.loss, device=device, knobs=built.knobs)
    if json_path:
        write_json(json_path, asdict(found))
    console_for_output(json_path=json_path).print(found.report(), highlight=False, soft_wrap=True)
