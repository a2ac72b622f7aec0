"""HiGHS: basis pursuit as a linear program."""

import numpy as np
from benchopt import BaseSolver
from scipy.optimize import linprog


class Solver(BaseSolver):
    """x is the difference of two vectors >= 0."""

    name = "HiGHS"
    requirements = ["scipy"]
    parameters = {"method": ["highs-ds", "highs-ipm"]}
    sampling_strategy = "run_once"

    def skip(self, Z, y, log_size):
        """Solve basis pursuit only."""
        return (False, None) if log_size is None else (True, "solves basis pursuit only")

    def set_objective(self, Z, y, log_size):
        """Take the problem."""
        self.Z, self.y = np.hstack([Z, -Z]), y

    def run(self, _):
        """Solve."""
        found = linprog(
            np.ones(self.Z.shape[1]), A_eq=self.Z, b_eq=self.y, bounds=(0, None), method=self.method
        )
        plus, minus = np.split(found.x, 2)
        self.x = plus - minus

    def get_result(self):
        """Return x."""
        return {"x": self.x}
