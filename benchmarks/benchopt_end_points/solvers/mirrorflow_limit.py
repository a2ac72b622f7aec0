"""mirrorflow.limit: the end point by its dual, without training."""

import numpy as np
import torch
from benchopt import BaseSolver

import mirrorflow as mf

SMALL = -60.0  # log A relative to the shortest solution, for basis pursuit


class Solver(BaseSolver):
    """Newton's method on the dual; basis pursuit as the end point of a very small A."""

    name = "mirrorflow-limit"
    requirements = ["pip::mirrorflow"]
    sampling_strategy = "run_once"

    def set_objective(self, Z, y, log_size):
        """Take the problem; R_a belongs to it."""
        self.Z, self.y = Z, y
        if log_size is None:
            log_size = SMALL + np.log(np.abs(np.linalg.lstsq(Z, y, rcond=None)[0]).max())
        w = torch.full((Z.shape[1],), np.exp(0.5 * (log_size + np.log(2.0))), dtype=torch.float64)
        self.R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), (torch.zeros_like(w), w))

    def warm_up(self):
        """Let libraries load."""
        self.run_once()

    def run(self, _):
        """Solve."""
        self.x = mf.limit(self.R, self.Z, self.y, 0.0).value.numpy()

    def get_result(self):
        """Return x."""
        return {"x": self.x}
