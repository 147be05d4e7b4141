"""`python -m evoplan` is `evoplan`."""

from evoplan.planner.cli import main

main()
