"""`python -m planner` is `evoplan`."""

from planner.cli import main

main()
