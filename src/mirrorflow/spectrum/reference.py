"""Reference values: the spectrum of a product of random factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["RandomProduct", "random_product"]

DRAWS = 256  # singular values that are averaged over, at least
LARGEST = 384  # of the smallest side: larger products have the spectrum of a smaller one, stretched


@dataclass(frozen=True)
class RandomProduct:
    """The mean ratio and effective rank of A B, of independent normal factors.

    Attributes
    ----------
    ratio : float
        Nuclear over Frobenius norm.
    effective_rank : float
        The exponential of the entropy of the normalized singular values.
    """

    ratio: float
    effective_rank: float


@lru_cache(maxsize=256)
def random_product(n: int, r: int, m: int) -> RandomProduct:
    r"""Return what A (n, r) times B (r, m) has where both have independent normal entries.

    It is what factors have that are initialized so, attention's for example, and that carry no
    structure yet: the value beside which a trained product's ratio and rank are low or high. No
    factor is formed. With ``A^T = L Q``, L the triangular factor of Bartlett's decomposition
    (normal entries below a diagonal of ``chi(n - i)``), the singular values of A B are those of the
    r x r matrix ``L_A^T L_B``.

    Parameters
    ----------
    n, r, m : int
        The shape of the product, positive.

    Returns
    -------
    RandomProduct
        The mean over some draws with a fixed seed, the same at every call: within about 1% where r
        is 8 or more.

    Examples
    --------
    >>> found = random_product(768, 64, 768)
    >>> round(found.ratio, 1), round(found.effective_rank)
    (7.8, 63)
    """
    if min(n, r, m) < 1:
        raise ValueError(f"n, r and m must be positive, got {n}, {r}, {m}. Give a product's shape.")
    if (smallest := min(n, r, m)) > LARGEST:  # ratio^2 and effective rank grow with the size
        times = smallest / LARGEST
        small = random_product(*(round(size / times) for size in (n, r, m)))
        return RandomProduct(small.ratio * times**0.5, small.effective_rank * times)
    rng = np.random.default_rng(0)
    draws = max(1, DRAWS // min(n, r, m))
    core = _triangular(rng, draws, n, r).transpose(0, 2, 1) @ _triangular(rng, draws, m, r)
    values = np.linalg.svd(core, compute_uv=False)[:, : min(n, r, m)]
    nuclear = values.sum(-1)
    p = values / nuclear[:, None]
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    ratio = nuclear / np.linalg.norm(values, axis=-1)
    return RandomProduct(float(ratio.mean()), float(np.exp(entropy).mean()))


def _triangular(rng: np.random.Generator, draws: int, n: int, r: int) -> np.ndarray:
    """Return L (draws, r, min(n, r)) with L L^T distributed as X^T X, X normal (n, r)."""
    k = min(n, r)
    if n < r:
        return rng.standard_normal((draws, r, n))
    found = np.tril(rng.standard_normal((draws, r, k)), -1)
    found[:, range(k), range(k)] = np.sqrt(rng.chisquare(n - np.arange(k), (draws, k)))
    return found
