"""`python -m evoplan.planner` is `evoplan`; torchrun starts it so."""

from evoplan.planner.cli import main

main()
