"""Data of the low-rank study: random matrices and images, from entries or measurements."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...framework.contract import Record

__all__ = [
    "SYNTHETIC",
    "Entries",
    "LowRankData",
    "Measurements",
    "drawn",
    "faces",
    "medians",
    "pixels",
]

Array = NDArray[np.float64]
HELD = 0.2  # of the data, to choose the knob on


@dataclass(frozen=True)
class Entries:
    """A matrix with NaN where it is not known."""

    M: Array

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self.M.shape[0], self.M.shape[1]

    def adjoint(self) -> Array:
        """Return what the data alone say: the known entries, 0 elsewhere."""
        return np.nan_to_num(self.M)

    def split(self, rng: np.random.Generator) -> tuple[Entries, Entries]:
        """Hold a part of the entries out."""
        held = rng.random(self.M.shape) < HELD
        return Entries(np.where(held, np.nan, self.M)), Entries(np.where(held, self.M, np.nan))

    def error(self, X: Array) -> float:
        """Return the mean squared error of X on the known entries."""
        return float(np.nanmean((X - self.M) ** 2))


@dataclass(frozen=True)
class Measurements:
    """y_i = <A_i, X>, A of shape (m, p, q)."""

    A: Array
    y: Array

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self.A.shape[1], self.A.shape[2]

    def adjoint(self) -> Array:
        """Return sum_i y_i A_i."""
        return np.tensordot(self.y, self.A, 1)

    def split(self, rng: np.random.Generator) -> tuple[Measurements, Measurements]:
        """Hold a part of the measurements out."""
        held = rng.random(len(self.y)) < HELD
        return Measurements(self.A[~held], self.y[~held]), Measurements(self.A[held], self.y[held])

    def error(self, X: Array) -> float:
        """Return the mean squared error of X on the measurements."""
        return float(((np.tensordot(self.A, X, 2) - self.y) ** 2).mean())


LowRankData = Entries | Measurements


def drawn(
    kind: str, truth: Array, seen: float, noise: float, rng: np.random.Generator
) -> LowRankData:
    """Draw which entries are seen, or what is measured."""
    if kind == "measured":
        A = rng.standard_normal((max(5, round(seen * truth.size)), *truth.shape))
        y = np.tensordot(A, truth, 2)
        return Measurements(A, y + noise * y.std() * rng.standard_normal(len(y)))
    noisy = truth + noise * truth.std() * rng.standard_normal(truth.shape)
    return Entries(np.where(rng.random(truth.shape) < seen, noisy, np.nan))


def pixels(name: str, shrink: int) -> Array:
    """Return an image, or one image a row, with grey levels in [0, 1]."""
    from sklearn.datasets import load_digits, load_sample_image

    if name == "digits":
        digits: Any = load_digits()
        return digits.data[:200] / 16.0
    if name == "faces":
        found = faces()
        assert found is not None
        return found
    grey = load_sample_image(f"{name}.jpg").mean(axis=2) / 255
    p, q = grey.shape[0] // shrink, grey.shape[1] // shrink
    return grey[: p * shrink, : q * shrink].reshape(p, shrink, q, shrink).mean(axis=(1, 3))


def faces() -> Array | None:
    """Return 200 Olivetti faces of 32 x 32, or None where they are not at hand.

    They come from scikit-learn's data folder or the network, as for the codes of Figure 10.
    """
    from ..coding._problem import images

    try:
        found, _ = images("olivetti")
    except OSError:
        return None
    quarters = found[:200].reshape(200, 32, 2, 32, 2).mean(axis=(2, 4))
    return quarters.reshape(200, -1)


SYNTHETIC = {"small": "entries, small", "large": "entries, large", "measured": "measurements"}


def medians(records: list[Record], keys: tuple[str, ...]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return for each value of the keys the medians over the rest, by method and measure."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for r in (r for r in records if "error" in r):
        groups.setdefault(tuple(r.get(k) for k in keys), {}).setdefault(r["method"], []).append(r)
    measures = ("error", "found", "seconds", "settled")
    return {
        cell: {name: {m: statistics.median(r[m] for r in found) for m in measures}
               for name, found in methods.items()}
        for cell, methods in groups.items()
    }  # fmt: skip
