"""Loads every file of peers, in the order of the table."""

from __future__ import annotations

from importlib import import_module

FILES = ("checkpointing", "selective", "compiled", "milp", "packages", "others")


def load() -> None:
    """Have all peers registered."""
    for name in FILES:
        import_module(f"evoplan.experiments.peers.{name}")
