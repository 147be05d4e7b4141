"""`python -m evoplan.planner` is `evoplan`; torchrun starts it so."""

from evoplan.planner.commands.cli import main

main()
