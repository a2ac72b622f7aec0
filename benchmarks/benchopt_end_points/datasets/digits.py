"""A handwritten digit as a combination of few others."""

import numpy as np
from benchopt import BaseDataset
from sklearn.datasets import load_digits


class Dataset(BaseDataset):
    """The columns of Z are images, y is one that is not among them; dependent pixels are merged."""

    name = "Digits"
    parameters = {"images": [1000]}
    test_parameters = {"images": [200]}
    requirements = ["scikit-learn"]

    def get_data(self):
        """Return Z and y in an orthonormal basis of the span of the images."""
        pixels = load_digits().data / 16.0
        chosen = np.random.default_rng(self.get_seed(use_repetition=True)).permutation(len(pixels))
        Z, y = pixels[chosen[1 : self.images + 1]].T, pixels[chosen[0]]
        U, s, _ = np.linalg.svd(Z, full_matrices=False)
        U = U[:, s > 1e-8 * s[0]]
        return {"Z": U.T @ Z, "y": U.T @ y}
