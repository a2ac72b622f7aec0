"""Gaussian measurements of a sparse vector, or of nothing in particular."""

import numpy as np
from benchopt import BaseDataset


class Dataset(BaseDataset):
    """Z is standard normal; y = Z x for an x with ones, or standard normal where there is none."""

    name = "Simulated"
    parameters = {
        "n_samples, n_features, nonzeros": [
            (40, 100, 5),
            (200, 1000, 0),
            (500, 5000, 40),
            (500, 5000, 0),
        ],
    }
    test_parameters = {"n_samples, n_features, nonzeros": [(10, 20, 2)]}
    requirements = []

    def get_data(self):
        """Draw Z and y."""
        rng = np.random.default_rng(self.get_seed(use_repetition=True))
        Z = rng.standard_normal((self.n_samples, self.n_features))
        if not self.nonzeros:
            return {"Z": Z, "y": rng.standard_normal(self.n_samples)}
        x = np.zeros(self.n_features)
        x[rng.choice(self.n_features, self.nonzeros, replace=False)] = 1.0
        return {"Z": Z, "y": Z @ x}
