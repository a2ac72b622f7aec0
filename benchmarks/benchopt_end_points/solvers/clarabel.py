"""Clarabel: basis pursuit as a linear program, by an interior point method."""

import clarabel
import numpy as np
from benchopt import BaseSolver
from scipy import sparse


class Solver(BaseSolver):
    """x is the difference of two vectors >= 0."""

    name = "Clarabel"
    requirements = ["pip::clarabel", "scipy"]
    sampling_strategy = "run_once"

    def skip(self, Z, y, log_size):
        """Solve basis pursuit only."""
        return (False, None) if log_size is None else (True, "solves basis pursuit only")

    def set_objective(self, Z, y, log_size):
        """Take the problem."""
        n, d = Z.shape
        self.A = sparse.csc_matrix(np.vstack([np.hstack([Z, -Z]), -np.eye(2 * d)]))
        self.b = np.r_[y, np.zeros(2 * d)]
        self.cones = [clarabel.ZeroConeT(n), clarabel.NonnegativeConeT(2 * d)]
        self.settings = clarabel.DefaultSettings()
        self.settings.verbose = False

    def run(self, _):
        """Solve."""
        size = self.A.shape[1]
        nothing = sparse.csc_matrix((size, size))
        problem = clarabel.DefaultSolver(
            nothing, np.ones(size), self.A, self.b, self.cones, self.settings
        )
        plus, minus = np.split(np.asarray(problem.solve().x), 2)
        self.x = plus - minus

    def get_result(self):
        """Return x."""
        return {"x": self.x}
