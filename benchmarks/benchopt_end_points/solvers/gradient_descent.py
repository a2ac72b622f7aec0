"""Gradient descent on m and w: what the end points are the end points of."""

import numpy as np
from benchopt import BaseSolver


class Solver(BaseSolver):
    """x = m * w from m = 0, w = sqrt(2 A), with steps that shrink as the factors grow."""

    name = "gradient-descent"
    requirements = []
    parameters = {"learning_rate": [0.25]}
    test_config = {"objective": {"log_A": -4.0}}
    sampling_strategy = "callback"

    def skip(self, Z, y, log_size):
        """Leave basis pursuit out: it is not where a start that is not 0 ends."""
        if log_size is None:
            return True, "training ends at basis pursuit only for a start of size 0"
        return False, None

    def set_objective(self, Z, y, log_size):
        """Take the problem."""
        self.Z, self.y, self.start = Z, y, np.exp(0.5 * (log_size + np.log(2.0)))

    def run(self, callback):
        """Descend until benchopt has seen enough."""
        m = np.zeros(self.Z.shape[1])
        w = np.full_like(m, self.start)
        curvature = np.linalg.norm(self.Z, 2) ** 2
        self.x = m * w
        while callback():
            for _ in range(20):
                gradient = self.Z.T @ (self.Z @ self.x - self.y)
                largest = max((m * m + w * w).max(), np.abs(gradient).max() / curvature)
                step = self.learning_rate / (curvature * largest)
                m, w = m - step * gradient * w, w - step * gradient * m
                self.x = m * w

    def get_result(self):
        """Return x."""
        return {"x": self.x}
