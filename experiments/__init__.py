"""Questions answered with the planner: one script each, writing JSON and drawing from it."""
