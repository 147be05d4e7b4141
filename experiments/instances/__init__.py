"""Named instances of the planner's problem, kept as data, and a runner that scores solvers on them."""
