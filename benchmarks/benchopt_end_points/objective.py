"""Basis pursuit, and the end points of training that tend to it as the start shrinks."""

import numpy as np
from benchopt import BaseObjective


class Objective(BaseObjective):
    """Of all x with Zx = y, the one of least L1 norm, or of least hyperbolic entropy.

    Training m and w on |Z (m * w) - y|^2 from m = 0, w = sqrt(2 A) ends at the minimizer of
    sum x arcsinh(x / A) - sqrt(x^2 + A^2); for A to 0 that is basis pursuit. ``log_A`` is
    log(A / largest entry of the shortest solution), or None for basis pursuit itself.
    """

    name = "Basis pursuit and end points of training"
    url = "https://github.com/mirrorflow/mirrorflow"
    requirements = ["numpy"]
    min_benchopt_version = "1.7"
    parameters = {"log_A": [None, -4.0]}

    def set_data(self, Z, y):
        """Take the data; the rows of Z must be independent."""
        self.Z, self.y = Z, y
        self.inverse = np.linalg.pinv(Z)
        if self.log_A is not None:
            self.log_size = self.log_A + np.log(np.abs(self.inverse @ y).max())

    def get_objective(self):
        """Return a solver what it needs: log_size is log A, or None."""
        return {"Z": self.Z, "y": self.y, "log_size": self._log_size()}

    def _log_size(self):
        return None if self.log_A is None else self.log_size

    def evaluate_result(self, x):
        """Measure the nearest x that fits exactly, so that no solver gains by not fitting."""
        residual = self.y - self.Z @ x
        fitting = x + self.inverse @ residual
        return {
            "value": self._value(fitting),
            "infeasibility": float(np.linalg.norm(residual) / np.linalg.norm(self.y)),
            "nonzeros": int((np.abs(x) > 1e-6 * np.abs(x).max(initial=1e-300)).sum()),
        }

    def _value(self, x):
        if self.log_A is None:
            return float(np.abs(x).sum())
        A = np.exp(self.log_size)
        return float((x * np.arcsinh(x / A) - np.sqrt(x * x + A * A) + A).sum())

    def get_one_result(self):
        """Return the shortest solution."""
        return {"x": self.inverse @ self.y}
