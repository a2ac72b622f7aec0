"""LARS: the lasso's path down to no penalty, whose end is basis pursuit."""

import warnings

import numpy as np
from benchopt import BaseSolver
from sklearn.linear_model import lars_path


class Solver(BaseSolver):
    """scikit-learn's homotopy."""

    name = "LARS"
    requirements = ["scikit-learn"]
    sampling_strategy = "run_once"

    def skip(self, Z, y, log_size):
        """Solve basis pursuit only."""
        return (False, None) if log_size is None else (True, "solves basis pursuit only")

    def set_objective(self, Z, y, log_size):
        """Take the problem."""
        self.Z, self.y = np.asfortranarray(Z), y

    def run(self, _):
        """Follow the path."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of early stops, when the path is at its end
            path = lars_path(
                self.Z, self.y, method="lasso", return_path=False, max_iter=20 * len(self.y)
            )
        self.x = path[2]

    def get_result(self):
        """Return x."""
        return {"x": self.x}
