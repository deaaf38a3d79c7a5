"""The mathematics of flow matching on callables v(x, t): path and schedules, solvers, guidance."""
