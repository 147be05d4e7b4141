"""`python -m evoplan` is `evoplan`."""

from evoplan.planner.commands.cli import main

main()
