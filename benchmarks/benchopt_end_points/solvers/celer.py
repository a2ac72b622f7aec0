"""celer: the lasso for penalties that fall to 0."""

import warnings

import numpy as np
from benchopt import BaseSolver
from celer import Lasso


class Solver(BaseSolver):
    """Working sets and extrapolation; benchopt's tolerance is the penalty, relative to its top."""

    name = "celer"
    requirements = ["pip::celer"]
    sampling_strategy = "tolerance"

    def skip(self, Z, y, log_size):
        """Solve basis pursuit only."""
        return (False, None) if log_size is None else (True, "solves basis pursuit only")

    def set_objective(self, Z, y, log_size):
        """Take the problem."""
        self.Z, self.y = np.asfortranarray(Z), y
        self.top = np.abs(Z.T @ y).max() / len(y)

    def warm_up(self):
        """Let libraries load."""
        self.run(0.5)

    def run(self, tolerance):
        """Solve for one penalty, to an accuracy that fits it."""
        part = min(max(float(tolerance), 1e-10), 0.9)
        model = Lasso(part * self.top, fit_intercept=False, tol=min(1e-4, 1e-3 * part))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of accuracies that are out of reach
            self.x = model.fit(self.Z, self.y).coef_

    def get_result(self):
        """Return x."""
        return {"x": self.x}
